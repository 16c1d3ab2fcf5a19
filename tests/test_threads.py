from collections.abc import Iterator

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_trpo import NPG, TRPO, MaskableTRPO, RecurrentTRPO, threads
from sb3_trpo.threads import choose_threads, default_threads, training_threads

MLP = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
CNN = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A machine on which torch takes three threads, with no variable set."""
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = th.get_num_threads()
    th.set_num_threads(3)
    monkeypatch.setattr(threads, "_DEFAULT", 3)
    yield 3
    th.set_num_threads(before)


@pytest.mark.parametrize(("policy", "number"), [(MLP, 1), (CNN, 3)])
def test_choose_threads_takes_one_unless_there_are_convolutions(policy: nn.Module, number: int) -> None:
    assert choose_threads(policy).number == number


@pytest.mark.parametrize("name", threads.VARIABLES)
def test_choose_threads_keeps_the_environment_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "3")
    assert str(choose_threads(MLP)) == f"Using 3 torch threads: {name}=3"


def test_choose_threads_keeps_the_number_that_the_user_set() -> None:
    th.set_num_threads(2)
    assert choose_threads(MLP) == (2, "set by torch.set_num_threads")


def test_choose_threads_leaves_other_devices_alone() -> None:
    assert choose_threads(nn.Linear(2, 2, device="meta")).number == 3


def test_training_threads_restores_the_number_after_an_error() -> None:
    def fail() -> None:
        with training_threads(MLP) as choice:
            assert th.get_num_threads() == choice.number == 1
            assert str(choice).startswith("Using 1 torch thread: ")
            raise KeyError("a fault")

    with pytest.raises(KeyError, match="a fault"):
        fail()
    assert th.get_num_threads() == 3


def test_training_threads_is_reentrant() -> None:
    with training_threads(MLP), training_threads(MLP) as inner:
        assert inner.number == 1
    assert th.get_num_threads() == 3


@pytest.mark.parametrize(
    ("algorithm", "policy"),
    [(TRPO, "MlpPolicy"), (NPG, "MlpPolicy"), (RecurrentTRPO, "MlpLstmPolicy"), (MaskableTRPO, "MlpPolicy")],
)
def test_predict_uses_the_threads_of_training(algorithm: type[TRPO], policy: str) -> None:
    seen: list[int] = []
    model = algorithm(policy, "CartPole-v1", n_steps=8, device="cpu")
    model.policy.action_net.register_forward_hook(lambda *_: seen.append(th.get_num_threads()))
    model.predict(np.zeros(4, np.float32))
    assert seen == [1]
    assert th.get_num_threads() == 3


@pytest.mark.parametrize(
    ("current", "n_cpus", "default"), [(16, 16, 16), (8, 16, 8), (4, 16, None), (1, 1, 1), (1, 2, 1), (3, 16, None)]
)
def test_default_threads_is_the_number_of_cores(current: int, n_cpus: int, default: int | None) -> None:
    assert default_threads(current, n_cpus) == default


def test_choose_threads_keeps_a_number_set_before_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_DEFAULT", None)
    assert choose_threads(MLP).number == 3
