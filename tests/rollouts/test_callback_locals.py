import copy
import pickle
from typing import Any

import pytest
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
)
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo.rollouts.callback_locals import StepLocals, all_callbacks, are_known, compute_locals

NAMES = frozenset({"values", "log_probs"})


class Own(BaseCallback):
    def _on_step(self) -> bool:
        return True


class Step:
    """Counts how often it is evaluated."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> dict[str, Any]:
        self.count += 1
        return {"values": 10 * self.count, "log_probs": -self.count}


@pytest.fixture
def step() -> Step:
    return Step()


@pytest.fixture
def variables(step: Step) -> StepLocals:
    variables = StepLocals({"a": 1})
    variables.compute(NAMES, step)
    return variables


ALL = {"a": 1, "values": 10, "log_probs": -1}
WHOLE: dict[str, Any] = {
    "dict": dict,
    "star": lambda variables: dict(**variables),
    "union": lambda variables: variables | {},
    "items": lambda variables: dict(variables.items()),
    "iteration": lambda variables: {name: variables[name] for name in variables},
    "keys_and_values": lambda variables: dict(zip(variables.keys(), variables.values(), strict=True)),
    "copy": lambda variables: variables.copy(),
    "copy_module": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda variables: pickle.loads(pickle.dumps(variables)),
    "repr": lambda variables: eval(repr(variables)),
    "update": lambda variables: (lambda target: (target.update(variables), target)[1])({}),
}


class TestStepLocals:
    def test_nothing_is_computed_that_is_not_read(self, variables, step):
        variables.update({"a": 2})
        assert variables["a"] == 2
        assert variables.get("b") is None
        assert "values" in variables
        assert "b" not in variables
        assert step.count == 0

    def test_names_are_computed_once_a_step(self, variables, step):
        assert (variables["values"], variables.get("log_probs"), variables["values"]) == (10, -1, 10)
        variables.update({"a": 2})
        assert (variables["log_probs"], variables.get("values", 5)) == (-2, 20)
        assert step.count == 2

    def test_given_ones_are_kept(self, variables, step):
        variables.update({"values": 3, "log_probs": 4})
        assert dict(variables) == {"a": 1, "values": 3, "log_probs": 4}
        assert step.count == 0

    def test_others_are_missing(self, variables):
        with pytest.raises(KeyError, match="b"):
            variables["b"]

    @pytest.mark.parametrize("name", WHOLE)
    def test_whole_is_complete(self, variables, name):
        whole = WHOLE[name](variables)
        assert whole == ALL
        assert type(whole) is dict

    def test_whole_is_a_dictionary(self, variables):
        assert isinstance(variables, dict)
        assert variables == ALL
        assert len(variables) == 3
        assert variables.pop("values") == 10
        assert variables.setdefault("log_probs", 5) == -1


def test_are_known_of_sb3s_own():
    env = make_vec_env("CartPole-v1")
    evaluation = EvalCallback(env, callback_after_eval=StopTrainingOnNoModelImprovement(3))
    assert are_known(CallbackList([evaluation, LogEveryNTimesteps(5), StopTrainingOnMaxEpisodes(3), ConvertCallback(None)]))


class Patched(StopTrainingOnMaxEpisodes):
    pass


def patched() -> BaseCallback:
    callback = StopTrainingOnMaxEpisodes(3)
    callback._on_step = lambda: True
    return callback


@pytest.mark.parametrize(
    "make",
    [
        Own,
        patched,
        lambda: Patched(3),
        lambda: ConvertCallback(lambda *_: True),
        lambda: EveryNTimesteps(5, Own()),
        lambda: EvalCallback(make_vec_env("CartPole-v1"), callback_on_new_best=Own()),
        lambda: EvalCallback(make_vec_env("CartPole-v1"), callback_after_eval=CallbackList([Own()])),
    ],
)
def test_are_known_is_false_of_a_users(make):
    assert not are_known(CallbackList([LogEveryNTimesteps(5), make()]))


def test_are_known_is_false_of_a_patched_class(monkeypatch):
    monkeypatch.setattr(StopTrainingOnMaxEpisodes, "_on_step", lambda self: True)
    assert not are_known(StopTrainingOnMaxEpisodes(3))


def test_all_callbacks_finds_them_in_attributes_lists_and_dictionaries():
    outer = Own()
    outer.one, outer.several, outer.named = Own(), [Own(), 3], {"a": Own()}
    outer.one.parent = outer
    assert len(all_callbacks(outer)) == 4


def test_compute_locals_keeps_what_is_shared(step):
    first, second, third = Own(), Own(), Own()
    first.locals = second.locals = {"a": 1}
    third.locals = {"a": 1}
    everyone = CallbackList([first, second, third])
    for _ in range(2):  # at the start of every rollout
        compute_locals(everyone, NAMES, step)
        assert first.locals is second.locals
        assert first.locals is not third.locals
        assert {"values", "log_probs"} <= first.locals.keys() & third.locals.keys()
