"""NPG: TRPO's direction, its length, and what happens to a step that leads nowhere."""

import copy
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from support.arguments import effective
from torch import nn

from sb3_trpo import NPG, TRPO
from sb3_trpo.npg import LINE_SEARCH_ARGUMENTS
from sb3_trpo.optim.parameters import flatten

N_STEPS = 64
VECTOR = spaces.Box(-2.0, 2.0, (3,))
SPACES = {
    "box": spaces.Box(-1.0, 1.0, (2,)),
    "discrete": spaces.Discrete(4),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(3),
}


class Noise(gym.Env):
    """Random observations, a reward that depends on the action and the observation, episodes of ten steps."""

    def __init__(self, action_space: spaces.Space = SPACES["box"]) -> None:
        self.action_space, self.observation_space = action_space, VECTOR

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.n_steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        self.last = self._observe()
        return self.last, float(np.mean(action)) * float(self.last[0]), False, self.n_steps % 10 == 0, {}

    def _observe(self) -> np.ndarray:
        self.last = self.np_random.uniform(-2.0, 2.0, 3).astype(np.float32)
        return self.last


def hooked(algorithm: type[Any]) -> type[Any]:
    """The algorithm, with a hook before each update and the log after each kept."""

    class Hooked(algorithm):  # type: ignore[misc]
        before_train: Callable[[Any], None] = staticmethod(lambda model: None)

        def train(self) -> None:
            self.before_train(self)
            self.state_before = copy.deepcopy(self.policy.state_dict())
            super().train()
            logged = {key: value for key, value in self.logger.name_to_value.items() if not key.startswith("time/")}
            self.logs = [*getattr(self, "logs", []), logged]

    return Hooked


def make(algorithm: type[Any] = NPG, action: str = "box", policy: Any = "MlpPolicy", hook: Any = None, **kwargs: Any) -> Any:
    defaults = {"n_steps": N_STEPS, "batch_size": 16, "seed": 0, "device": "cpu"}
    model = hooked(algorithm)(policy, Noise(SPACES[action]), **effective(defaults | kwargs))
    if hook is not None:
        model.before_train = hook
    return model


def is_critics(name: str) -> bool:
    return name.startswith(("value_net", "mlp_extractor.value_net"))


def actor_of(state: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
    return {name: tensor for name, tensor in state.items() if not is_critics(name)}


def same(first: dict[str, th.Tensor], second: dict[str, th.Tensor]) -> bool:
    return first.keys() == second.keys() and all(th.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("action", SPACES)
def test_the_step_is_trpos_where_trpo_takes_the_full_one(action: str) -> None:
    n_compared = 0
    for seed in range(6):
        trpo = make(TRPO, action, seed=seed, target_kl=0.003)
        trpo._kl_ratio = 0.5  # so that the line search starts with the full step
        trpo.learn(N_STEPS)
        npg = make(NPG, action, seed=seed, target_kl=0.003).learn(N_STEPS)
        full, short = npg.last_update, trpo.last_update
        assert full.step_length.last * short.step_length.last > 0.0
        if short.backtracks.last == 0:
            assert same(trpo.policy.state_dict(), npg.policy.state_dict())
            assert full == short.__class__(**{**vars(short), "train_seconds": full.train_seconds})
            n_compared += 1
        else:
            # The same ray, less far.
            assert short.step_length.last < full.step_length.last
            assert full.kl_divergence_loss.last > 0.003
    assert n_compared >= 1


@pytest.mark.parametrize("action", SPACES)
def test_a_fixed_step_by_hand(action: str) -> None:
    """θ + c (F + λI)⁻¹ g, with F the dense Hessian of the KL."""
    damping = 0.3
    theta: dict[str, th.Tensor] = {}

    def dense(model: NPG) -> None:
        policy = copy.deepcopy(model.policy)
        actor = [p for name, p in policy.named_parameters() if not is_critics(name)]
        rollout = next(model.rollout_buffer.get(None))
        discrete = action == "discrete"
        actions = rollout.actions.long().flatten() if discrete else rollout.actions
        advantages = (rollout.advantages - rollout.advantages.mean()) / rollout.advantages.std()
        log_prob = policy.get_distribution(rollout.observations).log_prob(actions)
        g = flatten(th.autograd.grad((log_prob * advantages).mean(), actor))
        old, new = (policy.get_distribution(rollout.observations).distribution for _ in range(2))
        pairs = zip(old, new, strict=True) if isinstance(old, list) else [(old, new)]
        if action == "box":
            pairs = [(th.distributions.Normal(old.mean.detach(), old.stddev.detach()), new)]
        else:
            pairs = [(type(p)(logits=p.logits.detach()), q) for p, q in pairs]
        kl = sum(th.distributions.kl_divergence(p, q).sum() for p, q in pairs) / N_STEPS
        slope = flatten(th.autograd.grad(kl, actor, create_graph=True))
        rows = [flatten(th.autograd.grad(one, actor, retain_graph=True, materialize_grads=True)) for one in slope]
        step = th.linalg.solve(th.stack(rows).double() + damping * th.eye(len(g)), g.double())
        theta["expected"] = flatten(actor).detach().double() + 0.7 * step
        theta["size"] = (0.7 * step).norm()

    model = make(
        action=action, hook=dense, actor_step_size=0.7, cg_damping=damping, cg_max_steps=200, cg_residual_tol=1e-5,
        policy_kwargs={"net_arch": [4]},
    ).learn(N_STEPS)  # fmt: skip
    after = flatten(actor_of(dict(model.policy.named_parameters())).values()).detach().double()
    assert float((after - theta["expected"]).norm()) < 1e-3 * float(theta["size"])
    assert model.last_update.step_length.last == 0.7


def test_the_quadratic_models_length_gives_about_the_target_kl() -> None:
    model = make(target_kl=1e-3, cg_max_steps=50, cg_residual_tol=1e-4).learn(5 * N_STEPS)
    for log in model.logs:
        assert log["train/kl_divergence_loss"] == pytest.approx(1e-3, rel=0.1)
        assert log["train/target_kl"] == 1e-3


def test_schedules_of_the_step_and_of_the_kl() -> None:
    def lengths(**kwargs: Any) -> list[float]:
        return [log["train/step_length"] for log in make(**kwargs).learn(4 * N_STEPS).logs]

    assert lengths(actor_step_size=lambda progress: 0.2 * progress) == pytest.approx([0.15, 0.1, 0.05, 0.0])
    model = make(target_kl=lambda progress: 1e-3 * progress).learn(4 * N_STEPS)
    assert [log["train/target_kl"] for log in model.logs] == pytest.approx([7.5e-4, 5e-4, 2.5e-4, 0.0])
    for log in model.logs:
        assert log["train/kl_divergence_loss"] == pytest.approx(log["train/target_kl"], rel=0.15)
    assert model.logs[-1]["train/is_step_success"] == 0.0  # of length 0


@pytest.mark.parametrize("n_policy_updates", [1, 3])
def test_several_steps_share_the_kl_but_a_fixed_step_is_fixed(n_policy_updates: int) -> None:
    shared = make(n_policy_updates=n_policy_updates, target_kl=1e-3).learn(N_STEPS).last_update
    fixed = make(n_policy_updates=n_policy_updates, actor_step_size=0.1).learn(N_STEPS).last_update
    assert shared.step_length.count == n_policy_updates
    assert shared.kl_divergence_loss.last <= 1.2e-3
    assert (fixed.step_length.min, fixed.step_length.max, fixed.step_length.count) == (0.1, 0.1, n_policy_updates)


class CountingPolicy(ActorCriticPolicy):
    """With a buffer that every evaluation of the policy changes."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.register_buffer("n_calls", th.zeros(1))

    def get_distribution(self, obs: Any) -> Any:
        self.n_calls += 1
        return super().get_distribution(obs)


@pytest.mark.parametrize("action", SPACES)
@pytest.mark.parametrize("size", [1e30, 1e38])
def test_a_step_to_nowhere_is_taken_back_bit_for_bit(action: str, size: float) -> None:
    model = make(action=action, policy=CountingPolicy, actor_step_size=size).learn(N_STEPS)
    assert same(actor_of(model.policy.state_dict()), actor_of(model.state_before))
    (log,) = model.logs
    assert log["train/is_step_success"] == 0.0
    assert (log["train/kl_divergence_loss"], log["train/step_length"], log["train/actual_improvement"]) == (0.0, 0.0, 0.0)
    assert model.last_update.backtracks.last == 0
    assert not same(model.policy.state_dict(), model.state_before)  # the critic


def test_a_step_out_of_the_trust_region_and_down_is_taken() -> None:
    """Nothing but its being finite is asked of it."""
    model = make(actor_step_size=50.0).learn(N_STEPS)
    (log,) = model.logs
    assert log["train/is_step_success"] == 1.0
    assert log["train/kl_divergence_loss"] > 1.0
    assert log["train/step_length"] == 50.0


def test_there_is_nothing_of_a_line_search_in_the_log() -> None:
    for kwargs in ({}, {"actor_step_size": 0.1}):
        model = make(**kwargs).learn(N_STEPS)
        assert not [key for key in model.logs[0] if "line_search" in key]
        assert ("train/target_kl" in model.logs[0]) == (not kwargs)
        trpos = set(make(TRPO).learn(N_STEPS).logs[0])
        missing = trpos - set(model.logs[0])
        assert missing - {"train/target_kl"} == {"train/is_line_search_success", "train/line_search"}


@pytest.mark.parametrize("name", LINE_SEARCH_ARGUMENTS)
def test_arguments_of_a_line_search_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"NPG has no line search: '{name}'"):
        make(**{name: 0.5})


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        make(no_such_argument=1)


def test_arguments_are_trpos_less_the_line_search() -> None:
    ours, trpos = (inspect.signature(algorithm.__init__).parameters for algorithm in (NPG, TRPO))
    assert list(ours)[:6] == ["self", "policy", "env", "learning_rate", "n_steps", "actor_step_size"]
    expected = {name: p.default for name, p in trpos.items() if name not in LINE_SEARCH_ARGUMENTS}
    assert {name: p.default for name, p in ours.items() if name != "actor_step_size"} == expected
    keyword = {name: expected[name] for name, p in trpos.items() if p.kind is p.KEYWORD_ONLY and name in expected}
    model = make(**keyword)
    assert {name: getattr(model, name) for name in keyword} == keyword


@pytest.mark.parametrize("value", [0, 0.0, -0.1, math.nan, math.inf, "0.1", True])
def test_a_bad_step_size_is_refused_before_an_environment_is_made(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^actor_step_size=.* is not allowed: it must be a finite number above 0, or a schedule"
    ):
        NPG("MlpPolicy", "NoSuchEnvironment-v0", actor_step_size=value)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"actor_step_size": 0.2},
        {"actor_step_size": lambda progress: 0.2 * progress},
        {"return_scaling": True},
    ],
    ids=["kl", "fixed", "schedule", "more"],
)
def test_a_saved_model_goes_on_as_it_would_have(kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = make(**kwargs).learn(2 * N_STEPS)
    model.save(tmp_path / "npg")
    loaded = hooked(NPG).load(tmp_path / "npg", env=Noise(), device="cpu", trust=True)
    size = kwargs.get("actor_step_size")
    assert callable(loaded.actor_step_size) if callable(size) else loaded.actor_step_size == size
    assert same(loaded.policy.state_dict(), model.policy.state_dict())
    for run in (model, loaded):
        run.logs = []
        run.set_random_seed(1)
        run._last_obs = None
        run.learn(2 * N_STEPS, reset_num_timesteps=False)
    assert same(loaded.policy.state_dict(), model.policy.state_dict())
    assert loaded.logs == model.logs


def test_the_run_has_its_own_name_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    make(tensorboard_log=str(tmp_path)).learn(N_STEPS)
    assert [path.name for path in tmp_path.iterdir()] == ["NPG_1"]


def test_it_learns() -> None:
    """To act as the first two coordinates of the observation say."""

    class Follow(Noise):
        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            reward = -float(np.square(action - self.last[:2]).sum())
            self.n_steps += 1
            return self._observe(), reward, False, self.n_steps % 10 == 0, {}

    def error(model: NPG) -> float:
        states = np.random.default_rng(0).uniform(-2.0, 2.0, (200, 3)).astype(np.float32)
        return float(
            np.square(model.predict(states, deterministic=True)[0] - np.clip(states[:, :2], -1, 1)).sum(axis=1).mean()
        )

    model = NPG("MlpPolicy", Follow(), n_steps=256, gamma=0.0, target_kl=0.05, seed=0, device="cpu")
    before = error(model)
    model.learn(30 * 256)
    assert error(model) < 0.3 * before


def test_statistics_of_batch_norm_move_once_an_update() -> None:
    model = make(policy_kwargs={"activation_fn": nn.Tanh})
    model.policy.mlp_extractor.policy_net.insert(1, nn.BatchNorm1d(64))
    model.learn(2 * N_STEPS)
    norm = model.policy.mlp_extractor.policy_net[1]
    assert float(norm.running_mean.abs().sum()) > 0.0
    assert int(norm.num_batches_tracked) == 2


def test_repr_names_the_step_size_if_there_is_one() -> None:
    assert repr(make(actor_step_size=0.1)) == "Hooked(MlpPolicy, actor_step_size=0.1, target_kl=0.03, num_timesteps=0)"
    assert repr(make()) == "Hooked(MlpPolicy, target_kl=0.03, num_timesteps=0)"
