from contextlib import nullcontext

import pytest
import torch as th
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from sb3_trpo.optim.plain import are_original, is_plain


def make_module() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)))


def nothing(*_: object) -> None:
    return None


def replace_weight(module: nn.Module) -> None:
    weight = module[0].weight.detach().clone()
    del module[0].weight
    module[0].weight = weight


#: Name ↦ what makes the module compute something else than its classes say.
CHANGES = {
    "forward_hook": lambda module: module[2][0].register_forward_hook(nothing),
    "forward_pre_hook": lambda module: module[0].register_forward_pre_hook(nothing),
    "backward_hook": lambda module: module[0].register_full_backward_hook(nothing),
    "hook_of_the_outermost": lambda module: module.register_forward_hook(nothing),
    "pruning": lambda module: prune.l1_unstructured(module[0], "weight", 2),
    "old_weight_norm": lambda module: weight_norm(module[0]),
    "spectral_norm": lambda module: parametrizations.spectral_norm(module[0]),
    "patched_forward": lambda module: setattr(module[0], "forward", lambda x: x),
    "patched_method": lambda module: setattr(module, "extra_repr", nothing),
    "compiled": lambda module: module[0].compile(),
    "weight_that_is_no_parameter": replace_weight,
}


def test_is_plain_of_an_untouched_module():
    assert is_plain(make_module())
    assert is_plain(nn.Tanh())
    assert is_plain(nn.Linear(2, 2, bias=False))


@pytest.mark.parametrize("name", CHANGES)
def test_is_plain_notices(name):
    module = make_module()
    with pytest.warns((FutureWarning, UserWarning)) if name == "old_weight_norm" else nullcontext():
        CHANGES[name](module)
    assert not is_plain(module)


def test_is_plain_notices_a_removed_hook():
    module = make_module()
    handle = module[0].register_forward_hook(nothing)
    assert not is_plain(module)
    handle.remove()
    assert is_plain(module)


def test_is_plain_notices_finished_pruning():
    module = make_module()
    prune.l1_unstructured(module[0], "weight", 2)
    prune.remove(module[0], "weight")
    assert is_plain(module)


@pytest.mark.parametrize("target", [nn.Linear, nn.Module])
def test_is_plain_notices_a_patched_class(target, monkeypatch):
    name = "forward" if target is nn.Linear else "_call_impl"
    own = getattr(target, name)
    monkeypatch.setattr(target, name, lambda *args: own(*args))
    assert not is_plain(make_module())


def test_is_plain_notices_global_hooks():
    handle = nn.modules.module.register_module_forward_hook(nothing)
    try:
        assert not is_plain(make_module())
    finally:
        handle.remove()
    assert is_plain(make_module())


def test_is_plain_notices_autocast():
    with th.autocast("cpu", dtype=th.bfloat16):
        assert not is_plain(make_module())
    with th.autocast("cpu", dtype=th.bfloat16, enabled=False):
        assert is_plain(make_module())


def test_is_plain_whatever_the_default_type_and_device(monkeypatch):
    module = make_module()
    th.set_default_dtype(th.float64)
    try:
        with th.device("meta"):
            assert is_plain(module)
    finally:
        th.set_default_dtype(th.float32)


def test_are_original_after_a_compilation(monkeypatch):
    """`torch.compile` patches the constructor of every module, once for the whole process."""
    monkeypatch.setattr(nn.Module, "__init__", lambda *args, **kwargs: None)
    assert are_original(nn.Linear)
    monkeypatch.setattr(nn.Module, "__call__", lambda *args, **kwargs: None)
    assert not are_original(nn.Linear)


def test_is_plain_after_something_else_was_compiled():
    """Which patches the constructor of all modules."""
    th.compile(nn.Linear(2, 2), backend="eager")(th.ones(1, 2))
    assert is_plain(make_module())
