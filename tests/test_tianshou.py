"""Tianshou's TRPO and NPG, as installed, are the oracle: same weights, same batch, same direction, same step."""

import copy
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from support.arguments import effective
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal

import sb3_trpo.trpo
from sb3_trpo import NPG, TRPO
from sb3_trpo.optim.batch import normalize_advantages
from sb3_trpo.optim.conjugate_gradient import CGStatus, conjugate_gradient
from sb3_trpo.optim.fisher import FisherOperator
from sb3_trpo.optim.kfac import KFACPreconditioner, kfac_layers
from sb3_trpo.optim.parameters import flatten
from sb3_trpo.rollouts.buffers import read_rollout

tianshou = pytest.importorskip("tianshou")

from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy  # noqa: E402
from tianshou.algorithm.optim import AdamOptimizerFactory  # noqa: E402
from tianshou.data import Batch, VectorReplayBuffer  # noqa: E402
from tianshou.utils.net.common import Net  # noqa: E402
from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic  # noqa: E402

DAMPING = 0.1  # theirs, fixed

#: Name of a case of ``conftest`` ↦ what makes Tianshou's distribution from its actor's outputs.
FAMILIES: dict[str, Callable[[Any], Any]] = {
    "box": lambda outputs: Independent(Normal(*outputs), 1),
    "discrete": lambda logits: Categorical(logits=logits),
    "multi_binary": lambda logits: Independent(Bernoulli(logits=logits), 1),
}


class ActionSampler(nn.Module):
    """Copies of an SB3 policy's networks behind the interface of Tianshou's actors, in whatever precision they have."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        if hasattr(policy, "log_std"):
            self.log_std = nn.Parameter(policy.log_std.detach().clone())
        self.network = copy.deepcopy(nn.Sequential(*policy.mlp_extractor.policy_net, policy.action_net))

    def forward(self, obs: Any, state: Any = None, info: Any = None) -> tuple[Any, Any]:
        outputs = self.network(th.as_tensor(obs, dtype=next(self.network.parameters()).dtype))
        return ((outputs, self.log_std.exp().expand_as(outputs)) if hasattr(self, "log_std") else outputs), state


class Critic(nn.Module):
    """The same for the critic."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.network = copy.deepcopy(nn.Sequential(*policy.mlp_extractor.value_net, policy.value_net))

    def forward(self, obs: Any, **kwargs: Any) -> th.Tensor:
        return self.network(th.as_tensor(obs, dtype=next(self.network.parameters()).dtype))


def theirs(
    algorithm: Any, actor: nn.Module, critic: nn.Module, action_space: spaces.Space, dist_fn: Any, **kwargs: Any
) -> Any:
    """Tianshou's algorithm, with conjugate gradients run to convergence instead of for ten iterations."""
    policy = ProbabilisticActorPolicy(
        actor=actor, dist_fn=dist_fn, action_space=action_space, action_scaling=False, action_bound_method=None
    )
    made = algorithm(policy=policy, critic=critic, optim=AdamOptimizerFactory(lr=0.0), optim_critic_iters=1, **kwargs)
    solve = made._conjugate_gradients
    made._conjugate_gradients = lambda b, slope, nsteps: solve(b, slope, nsteps=300, residual_tol=1e-12 * float(b.dot(b)))
    assert made._damping == DAMPING
    return made


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_direction_is_theirs(name: str, preconditioned: bool, make_case: Any) -> None:
    case = make_case(name, n_states=40)
    rollout = case.rollout
    algorithm = theirs(
        tianshou.algorithm.TRPO, ActionSampler(case.policy), Critic(case.policy), case.policy.action_space, FAMILIES[name]
    )

    dist = algorithm.policy(Batch(obs=rollout.inputs, info={})).dist
    loss = -(dist.log_prob(rollout.actions) * rollout.advantages).mean()
    slope = algorithm._get_flat_grad(loss, algorithm.policy.actor, retain_graph=True).detach()
    with th.no_grad():
        old = algorithm.policy(Batch(obs=rollout.inputs, info={})).dist
    kl = th.distributions.kl_divergence(old, dist).mean()
    kl_slope = algorithm._get_flat_grad(kl, algorithm.policy.actor, create_graph=True)
    expected = -algorithm._conjugate_gradients(slope, kl_slope, nsteps=10)

    layers = kfac_layers(case.policy, case.actor) if preconditioned else []
    surrogate = case.surrogate(layers=layers)
    gradient = surrogate.gradient()
    inverse = KFACPreconditioner(surrogate, DAMPING) if preconditioned else None
    fisher = FisherOperator(surrogate, DAMPING)
    solution = conjugate_gradient(fisher, gradient, max_iter=300, rtol=1e-6, M=inverse)

    th.testing.assert_close(gradient, -slope, rtol=1e-9, atol=1e-12)
    assert solution.status is CGStatus.CONVERGED
    assert float((solution.x - expected).norm()) < 1e-4 * float(expected.norm())
    # Their damped product, and with it their step's length, too.
    th.testing.assert_close(fisher(expected), algorithm._MVP(expected, kl_slope), rtol=1e-6, atol=1e-9)


class Swing(gym.Env):
    """Random observations; episodes end by themselves or by a limit; rewards of any size."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,))
    action_space = spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.n_steps = 0
        return self.np_random.normal(size=3).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        observation = self.np_random.normal(size=3).astype(np.float32)
        reward = 20.0 * float(action[0] * observation[0]) + 5.0 * float(self.np_random.normal()) + 3.0
        return observation, reward, bool(self.np_random.random() < 0.1), self.n_steps >= 6, {}


def updated(algorithm: type[TRPO], **arguments: Any) -> Any:
    """A model after one update, with its policy as it was before; every layer matters to its actions."""

    class Recording(algorithm):  # type: ignore[valid-type, misc]
        def train(self) -> None:
            self.policy_before = copy.deepcopy(self.policy)
            super().train()

    model = Recording("MlpPolicy", Swing(), **(SETTINGS | arguments))
    model._kl_ratio = 0.5  # so that the line search starts with the full step, as theirs
    with th.no_grad():
        model.policy.action_net.weight *= 30.0
    return model.learn(SETTINGS["n_steps"])


SETTINGS: dict[str, Any] = {
    "n_steps": 128,
    "cg_damping": DAMPING,
    "cg_max_steps": 300,
    "cg_residual_tol": 1e-5,
    "policy_kwargs": {"net_arch": [16, 16], "log_std_init": -0.5},
    "seed": 0,
    "device": "cpu",
}


def their_networks(policy: Any) -> tuple[nn.Module, nn.Module]:
    """Tianshou's own modules with the weights of an SB3 policy."""
    actor = ContinuousActorProbabilistic(
        preprocess_net=Net(state_shape=(3,), hidden_sizes=(16, 16), activation=nn.Tanh), action_shape=(2,), unbounded=True
    )
    critic = ContinuousCritic(preprocess_net=Net(state_shape=(3,), hidden_sizes=(16, 16), activation=nn.Tanh))
    own_actor = [policy.log_std, *policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    own_critic = [*policy.mlp_extractor.value_net.parameters(), *policy.value_net.parameters()]
    with th.no_grad():
        for module, own in ((actor, own_actor), (critic, own_critic)):
            for parameter, value in zip(module.parameters(), own, strict=True):
                parameter.copy_(value.reshape(parameter.shape))
    return actor, critic


def actor_vector(policy: Any) -> th.Tensor:
    parameters = [policy.log_std, *policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    return flatten(parameters).detach().double()


def their_update(model: Any, algorithm: type[Any], **kwargs: Any) -> tuple[th.Tensor, th.Tensor, Any]:
    """Their update on our rollout from our weights: θ before, θ after, their statistics."""
    actor, critic = their_networks(model.policy_before)
    made = theirs(algorithm, actor, critic, Swing.action_space, FAMILIES["box"], **kwargs)
    buffer = model.rollout_buffer
    rollout = normalize_advantages(read_rollout(buffer, Swing.action_space))
    batch = Batch(obs=rollout.inputs, act=rollout.actions, adv=rollout.advantages, returns=rollout.returns, info={})
    with th.no_grad():
        batch.logp_old = made.policy(batch).dist.log_prob(batch.act)
    before = flatten(actor.parameters()).detach().double()
    statistics = made._update_with_batch(batch, batch_size=None, repeat=1)
    return before, flatten(actor.parameters()).detach().double(), statistics


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", [0.1, 0.5])
def test_an_update_of_npg_is_theirs(seed: int, size: float) -> None:
    model = updated(NPG, actor_step_size=size, seed=seed)
    before, after, statistics = their_update(model, tianshou.algorithm.NPG, trust_region_size=size)

    assert th.equal(before, actor_vector(model.policy_before))
    step, expected = actor_vector(model.policy) - before, after - before
    assert float(expected.norm()) > 0.05
    assert float((step - expected).norm()) < 2e-4 * float(expected.norm())
    th.testing.assert_close(before + step, after, rtol=1e-4, atol=1e-4)
    assert model.last_update.step_length.last == pytest.approx(size)
    assert model.last_update.kl_divergence_loss.last == pytest.approx(statistics.kl.mean, rel=1e-3)


@pytest.mark.parametrize("seed", [2, 4, 9])
def test_an_update_of_trpo_is_theirs(seed: int) -> None:
    """Their length is √(2δ / sᵀ(F + λI)s), ours √(2δ / sᵀFs): with δ smaller by the ratio of the two, the same step."""
    max_kl = 1e-3
    probe = updated(TRPO, target_kl=max_kl, seed=seed)
    before, after, statistics = their_update(probe, tianshou.algorithm.TRPO, max_kl=max_kl)
    length, expected = statistics.step_size.mean, after - before
    direction = expected / length
    damped = 2.0 * max_kl / length**2
    undamped = damped - DAMPING * float(direction.dot(direction))
    assert 0.3 < undamped / damped < 0.95

    model = updated(TRPO, target_kl=max_kl * undamped / damped, seed=seed)
    step = actor_vector(model.policy) - before
    assert model.last_update.backtracks.last == 0  # at these seeds, the KL of the full step is just inside
    assert float((step - expected).norm()) < 5e-4 * float(expected.norm())
    th.testing.assert_close(before + step, after, rtol=1e-4, atol=1e-4)
    assert model.last_update.step_length.last == pytest.approx(length, rel=5e-4)
    assert model.last_update.kl_divergence_loss.last == pytest.approx(statistics.kl.mean, rel=2e-3)
    # At the same δ ours goes further, up to the trust region's boundary.
    own = actor_vector(probe.policy) - before
    assert float((own / own.norm() - expected / expected.norm()).norm()) < 5e-4
    assert statistics.kl.mean < 0.95 * max_kl
    assert 0.97 * max_kl < probe.last_update.kl_divergence_loss.last <= max_kl


class Transitions(BaseCallback):
    """What Tianshou's buffer would hold."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, np.ndarray]] = []

    def _on_rollout_start(self) -> None:
        self.steps = []
        self.obs = np.array(self.model._last_obs)

    def _on_step(self) -> bool:
        dones, infos, after = self.locals["dones"], self.locals["infos"], self.locals["new_obs"]
        truncated = np.array([info["TimeLimit.truncated"] for info in infos])
        last = [info["terminal_observation"] if done else obs for done, info, obs in zip(dones, infos, after, strict=True)]
        step = {"obs": self.obs, "obs_next": np.stack(last), "rew": self.locals["rewards"].astype(np.float64)}
        self.steps.append(step | {"terminated": dones & ~truncated, "truncated": truncated})
        self.obs = after.copy()
        return True


@pytest.mark.parametrize("critic_method", ["gauss_newton", "minibatch"])
def test_return_scaling_is_theirs(critic_method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n_envs, n_steps, targets, scales = 3, 20, [], []
    for name in ("fit_gauss_newton", "fit_minibatches"):
        fit = getattr(sb3_trpo.trpo, name)

        def spy(values: Any, rollout: Any, *args: Any, fit: Any = fit, **kwargs: Any) -> Any:
            chunks = rollout if isinstance(rollout, list) else [rollout]
            targets.append(th.cat([chunk.returns for chunk in chunks]))
            return fit(values, rollout, *args, **kwargs)

        monkeypatch.setattr(sb3_trpo.trpo, name, spy)
    oracle = None

    class Compared(TRPO):
        def train(self) -> None:
            nonlocal oracle
            networks = ActionSampler(self.policy), Critic(self.policy)
            arguments = {"gamma": 0.9, "gae_lambda": 0.8, "return_scaling": True}
            if oracle is None:
                oracle = theirs(tianshou.algorithm.TRPO, *networks, Swing.action_space, FAMILIES["box"], **arguments)
            oracle.critic = networks[1]
            memory = VectorReplayBuffer(n_envs * n_steps, n_envs)
            for step in transitions.steps:
                memory.add(Batch(act=np.zeros((n_envs, 2)), info={}, **step))
            batch, indices = memory.sample(0)
            scales.append(float(np.sqrt(oracle.ret_rms.var + 1e-8)))
            values = oracle.critic(batch.obs).flatten().detach().numpy() * scales[-1]
            batch = oracle._add_returns_and_advantages(batch, memory, indices)

            def by_env(array: np.ndarray) -> np.ndarray:
                return array.swapaxes(0, 1).flatten()

            buffer = self.rollout_buffer
            np.testing.assert_allclose(by_env(buffer.values), values, rtol=1e-5, atol=1e-4)
            np.testing.assert_allclose(by_env(buffer.advantages), batch.adv.numpy(), rtol=1e-4, atol=1e-3)
            super().train()
            ours = targets[-1].numpy().reshape(n_steps, n_envs)
            np.testing.assert_allclose(by_env(ours), batch.returns.numpy(), rtol=1e-4, atol=1e-4)
            assert self.return_moments.mean == pytest.approx(oracle.ret_rms.mean, rel=1e-5)
            assert self.return_moments.var == pytest.approx(oracle.ret_rms.var, rel=1e-5)
            assert self.return_moments.count == oracle.ret_rms.count

    env = make_vec_env(Swing, n_envs, seed=0)
    settings = {"return_scaling": True, "gamma": 0.9, "gae_lambda": 0.8, "batch_size": 20, "critic_method": critic_method}
    transitions = Transitions()
    model = Compared("MlpPolicy", env, n_steps=n_steps, seed=0, device="cpu", **effective(settings))
    model.learn(4 * n_envs * n_steps, callback=transitions)

    assert len(targets) == len(scales) == 4
    assert scales[0] == pytest.approx(1.0)
    assert min(scales[1:]) > 5.0
    truncated, terminated = (sum(step[kind].sum() for step in transitions.steps) for kind in ("truncated", "terminated"))
    assert truncated > 0
    assert terminated > 0
