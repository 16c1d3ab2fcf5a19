"""MuJoCo's tasks of version 5, which Gymnasium has from 1.0 on."""

from typing import Any

import gymnasium as gym
import pytest

needs_v5 = pytest.mark.skipif("HalfCheetah-v5" not in gym.registry, reason="Gymnasium has no v5 of MuJoCo's tasks")


def v5(name: str, *values: Any) -> Any:
    """Parameters of a test: the task, and other values."""
    return pytest.param(f"{name}-v5", *values, marks=needs_v5)
