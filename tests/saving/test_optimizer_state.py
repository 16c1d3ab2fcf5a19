"""What a file says of an optimizer fits its parameters, or the file is refused when it is loaded."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch as th
from torch import nn, optim

from sb3_trpo import TRPO, CorruptCheckpointError
from sb3_trpo.saving.optimizer_state import ELEMENTWISE, check_optimizer

State = dict[str, Any]
MEMBER = "policy.optimizer.pth"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.zip"
    arguments = {"n_steps": 16, "batch_size": 16, "critic_method": "minibatch", "policy_kwargs": {"net_arch": [4]}}
    TRPO("MlpPolicy", "CartPole-v1", device="cpu", **arguments).learn(16).save(path)
    return path


def change(path: Path, target: Path, function: Callable[[State], object]) -> None:
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            contents = source.read(name)
            if name == MEMBER:
                state, file = th.load(io.BytesIO(contents)), io.BytesIO()
                function(state)
                th.save(state, file)
                contents = file.getvalue()
            archive.writestr(name, contents)


def first(state: State) -> State:
    return next(iter(state["state"].values()))  # type: ignore[no-any-return]


DAMAGES: dict[str, Callable[[State], object]] = {
    "another_shape": lambda state: first(state).update(exp_avg=th.zeros(3)),
    "one_number": lambda state: first(state).update(exp_avg=th.zeros(())),
    "no_tensor": lambda state: first(state).update(exp_avg=1.0),
    "several_steps": lambda state: first(state).update(step=th.zeros(5)),
    "missing": lambda state: first(state).pop("exp_avg"),
    "missing_for_an_option": lambda state: state["param_groups"][0].update(amsgrad=True),
    "option_missing": lambda state: state["param_groups"][0].pop("eps"),
    "option_of_another_type": lambda state: state["param_groups"][0].update(betas=None),
    "text": lambda state: state["param_groups"][0].update(lr="fast"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_load_refuses_the_state_of_another_optimizer(damage: str, saved: Path, tmp_path: Path) -> None:
    change(saved, tmp_path / "model.zip", DAMAGES[damage])
    with pytest.raises(CorruptCheckpointError, match=rf"model\.zip: '{MEMBER}'") as error:
        TRPO.load(tmp_path / "model.zip", device="cpu")
    assert damage != "another_shape" or r"'exp_avg' has shape (3,), and its parameter (4, 4)" in str(error.value)


OPTIONS: dict[str, list[State]] = {
    "Adam": [{}, {"amsgrad": True, "weight_decay": 0.1}, {"foreach": True}, {"fused": True}],
    "SGD": [{}, {"momentum": 0.9, "nesterov": True}],
    "RMSpropTFLike": [{}, {"centered": True, "momentum": 0.5}],
}


@pytest.mark.parametrize(
    ("kind", "options"), [(kind, options) for kind in ELEMENTWISE for options in OPTIONS.get(kind.__name__, [{}])]
)
@pytest.mark.parametrize("n_steps", [0, 2])
def test_check_optimizer_takes_every_state_of_its_own_and_leaves_it(kind: Any, options: State, n_steps: int) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1).double())
    try:
        optimizer, loaded = (kind(net.parameters(), lr=0.01, **options) for _ in range(2))
    except RuntimeError as error:  # of older versions of torch on the CPU
        pytest.skip(str(error))
    for _ in range(n_steps):
        for parameter in net.parameters():
            parameter.grad = th.ones_like(parameter)
        optimizer.step()
    loaded.load_state_dict(optimizer.state_dict())
    before = repr((loaded.state_dict(), list(net.parameters())))
    check_optimizer(loaded, "file", MEMBER)
    assert repr((loaded.state_dict(), list(net.parameters()))) == before


def test_check_optimizer_leaves_other_classes_alone() -> None:
    class Mine(optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise AssertionError

    check_optimizer(Mine([nn.Parameter(th.ones(2))]), "file", MEMBER)
