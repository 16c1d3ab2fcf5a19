"""The average of the policy over the updates, as a callback."""

from pathlib import Path
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo import TRPO, PolicyAverage
from sb3_trpo.optim.parameters import flatten

N_STEPS = 32


def make(**kwargs: Any) -> TRPO:
    return TRPO("MlpPolicy", "CartPole-v1", n_steps=N_STEPS, seed=0, device="cpu", **kwargs)


def vector(model: TRPO) -> th.Tensor:
    return flatten(model.policy.parameters()).detach().clone()


class KeepPolicies(BaseCallback):
    """The policy at the start of each rollout and at the end of training; stops in a rollout if asked to."""

    def __init__(self, last_step: int | None = None) -> None:
        super().__init__()
        self.last_step = last_step
        self.kept: list[th.Tensor] = []

    def _on_rollout_start(self) -> None:
        self.kept.append(vector(self.model))

    def _on_step(self) -> bool:
        return self.n_calls != self.last_step

    def _on_training_end(self) -> None:
        self.kept.append(vector(self.model))


def average_of(policies: list[th.Tensor], decay: float) -> th.Tensor:
    average = policies[0]
    for n, policy in enumerate(policies[1:], start=2):
        d = min(decay, 1 - 1 / n)
        average = d * average + (1 - d) * policy
    return average


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_policy_average_is_the_policy_at_the_end(decay: float) -> None:
    policies = KeepPolicies()
    model = make()
    for _ in range(2):  # each call of learn starts a new one
        policies.kept.clear()
        model.learn(5 * N_STEPS, CallbackList([policies, PolicyAverage(decay)]), reset_num_timesteps=False)
        assert len(policies.kept) == 6
        th.testing.assert_close(vector(model), average_of(policies.kept, decay))
    assert not th.allclose(vector(model), policies.kept[-1])


def test_policy_average_leaves_the_training_alone() -> None:
    alone, averaged = KeepPolicies(), KeepPolicies()
    make().learn(5 * N_STEPS, alone)
    evaluation = EvalCallback(make_vec_env("CartPole-v1"), eval_freq=20, n_eval_episodes=1, verbose=0)
    make().learn(5 * N_STEPS, CallbackList([averaged, PolicyAverage(0.7, evaluation)]))
    assert evaluation.n_calls == 5 * N_STEPS
    assert all(map(th.equal, alone.kept, averaged.kept))


def test_policy_average_is_what_its_evaluation_sees(tmp_path: Path) -> None:
    policies = KeepPolicies()
    evaluation = EvalCallback(
        make_vec_env("CartPole-v1"), eval_freq=2 * N_STEPS, n_eval_episodes=1, best_model_save_path=str(tmp_path), verbose=0
    )
    average = PolicyAverage(0.7, evaluation)
    model = make()
    model.learn(3 * N_STEPS, CallbackList([policies, average]))
    saved = TRPO.load(tmp_path / "best_model")  # in the second rollout
    th.testing.assert_close(vector(saved), average_of(policies.kept[:2], 0.7))
    newest = policies.kept[-1]
    with average.in_place():
        th.testing.assert_close(vector(model), average_of(policies.kept, 0.7))
    assert not th.allclose(vector(model), newest)


def test_policy_average_of_a_training_that_a_callback_stops_has_no_policy_twice() -> None:
    policies = KeepPolicies(last_step=2 * N_STEPS + 5)
    model = make().learn(5 * N_STEPS, CallbackList([policies, PolicyAverage(0.9)]))
    th.testing.assert_close(vector(model), average_of(policies.kept[:3], 0.9))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, r"decay=1.0 is not allowed: it must be a number in \(0, 1\)"),
        ({"decay": "0.9"}, "decay='0.9' is not allowed"),
        ({"evaluation": KeepPolicies()}, "evaluation=.* is not allowed: it must be an EvalCallback"),
    ],
)
def test_policy_average_refuses_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyAverage(**arguments)
