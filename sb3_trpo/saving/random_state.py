"""The state of the random generators that all of a process shares."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th


def random_state() -> dict[str, Any]:
    """
    The states of Python's, NumPy's and torch's global generators, CUDA's included.

    :return: states, by library
    """
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - the legacy generator is what SB3 seeds
        "torch": th.get_rng_state().numpy(),
        "cuda": [state.numpy() for state in th.cuda.get_rng_state_all()] if th.cuda.is_initialized() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """
    Put states back.

    :param state: as :func:`random_state` gives it; states of graphics cards that are not there are left out
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002 - as above
    th.set_rng_state(th.as_tensor(state["torch"]))
    for device, card in enumerate(state["cuda"][: th.cuda.device_count()]):
        th.cuda.set_rng_state(th.as_tensor(card), device)


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """
    Leave the global generators as they are, whatever is drawn from them inside.

    :return: context manager
    """
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
