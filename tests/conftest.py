"""Tiny SB3 policies with random rollouts in float64, over every kind of action space, for exact comparisons."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from support.models import policy_model
from torch import nn

from sb3_trpo.optim.batch import Inputs, RolloutBatch
from sb3_trpo.optim.mlp import MLP
from sb3_trpo.optim.objective import Surrogate

th.set_num_threads(1)

N_STATES = 12
VECTOR = spaces.Box(-np.inf, np.inf, (3,))
BOX = spaces.Box(-1.0, 1.0, (2,))

#: Name of a case ↦ observation space, action space, further arguments of the policy.
CASES: dict[str, tuple[spaces.Space, spaces.Space, dict[str, Any]]] = {
    "box": (VECTOR, BOX, {}),
    "gsde": (VECTOR, BOX, {"use_sde": True}),
    "gsde_squashed": (VECTOR, BOX, {"use_sde": True, "squash_output": True, "full_std": False}),
    "discrete": (VECTOR, spaces.Discrete(4), {}),
    "multi_discrete": (VECTOR, spaces.MultiDiscrete([2, 3, 4]), {}),
    "multi_binary": (VECTOR, spaces.MultiBinary(3), {}),
    "dict_observation": (spaces.Dict({"speed": VECTOR, "gear": spaces.Discrete(4)}), BOX, {}),
}


class DoubleFlatten(FlattenExtractor):
    """SB3 casts every observation to float32; this casts it on to float64."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations).double()


class DoubleCombined(CombinedExtractor):
    """The same for Dict observations."""

    def forward(self, observations: dict[str, th.Tensor]) -> th.Tensor:
        return super().forward(observations).double()


class LearnedExtractor(DoubleFlatten):
    """An extractor with parameters."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space)
        self.layer = nn.Linear(self.features_dim, self.features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.tanh(self.layer(super().forward(observations)))


class Beta(DiagGaussianDistribution):
    """A user's own family, unknown to the package, whose KL torch knows."""

    def proba_distribution(self, alpha: th.Tensor, beta: th.Tensor) -> "Beta":
        self.distribution = th.distributions.Beta(1.0 + nn.functional.softplus(alpha), 1.0 + nn.functional.softplus(beta))
        return self


class FullGaussian(DiagGaussianDistribution):
    """Correlated actions: the KL is one number a state."""

    def proba_distribution(self, mean_actions: th.Tensor, factor: th.Tensor) -> "FullGaussian":
        covariance_factor = th.diag_embed(factor.exp()) + 0.5 * factor.new_ones(self.action_dim, self.action_dim).tril(-1)
        self.distribution = th.distributions.MultivariateNormal(mean_actions, scale_tril=covariance_factor)
        return self

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        return self.distribution.log_prob(actions)

    def entropy(self) -> th.Tensor:
        return self.distribution.entropy()


class TwoHeadedPolicy(ActorCriticPolicy):
    """A user's own policy: both parameters of the distribution are outputs of the network."""

    family: type[Distribution] = DiagGaussianDistribution

    def _build(self, lr_schedule: Callable[[float], float]) -> None:
        super()._build(lr_schedule)
        del self.log_std
        self.action_dist = self.family(self.action_net.out_features)
        self.action_net = nn.Linear(self.action_net.in_features, 2 * self.action_net.out_features)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        return self.action_dist.proba_distribution(*self.action_net(latent_pi).chunk(2, dim=-1))


class BetaPolicy(TwoHeadedPolicy):
    family = Beta


class FullGaussianPolicy(TwoHeadedPolicy):
    family = FullGaussian


#: Name of a user's own policy, over Box observations and actions, ↦ its class.
USER_POLICIES: dict[str, type[ActorCriticPolicy]] = {
    "state_dependent_gaussian": TwoHeadedPolicy,
    "beta": BetaPolicy,
    "full_gaussian": FullGaussianPolicy,
}


@dataclass
class Case:
    """
    A policy and a rollout of its own.

    :param policy: float64, with every parameter random
    :param actor: θ by name, independent of how the package finds it
    :param rollout: random observations, the policy's actions, random advantages and returns
    """

    policy: ActorCriticPolicy
    actor: list[nn.Parameter]
    rollout: RolloutBatch

    @property
    def distribution(self) -> Callable[[Inputs], Any]:
        return self.policy.get_distribution

    def values(self, inputs: Inputs) -> th.Tensor:
        return self.policy.predict_values(inputs).flatten()

    def differentiate_everything(self) -> None:
        """SB3's gSDE stops gradients at the features of its noise; let them through, to compare with finite differences."""
        self.policy.action_dist.learn_features = True

    def surrogate(
        self,
        chunk_size: int | None = None,
        *,
        rollout: RolloutBatch | None = None,
        actor: list[nn.Parameter] | None = None,
        layers: Sequence[nn.Module] = (),
        mlp: MLP | None = None,
        ent_coef: float = 0.0,
    ) -> Surrogate:
        model = policy_model(self.distribution, self.actor if actor is None else actor, layers, mlp)
        return Surrogate(model, self.rollout if rollout is None else rollout, chunk_size, ent_coef)

    def mean_kl_hessian(self, rollout: RolloutBatch | None = None) -> th.Tensor:
        """The oracle for F: the dense Hessian of the mean joint KL at θ_old, by torch's own KL of each component."""
        rollout = self.rollout if rollout is None else rollout
        names = [name for name, p in self.policy.named_parameters() if any(p is q for q in self.actor)]
        with th.no_grad():
            old = _as_list(self.distribution(rollout.inputs).distribution)

        def mean_kl(*theta: th.Tensor) -> th.Tensor:
            new = _as_list(th.func.functional_call(_Actor(self.policy), _named(names, theta), (rollout.inputs,)).distribution)
            kl = sum(
                th.distributions.kl_divergence(p, q).reshape(rollout.n_states, -1).sum(dim=1)
                for p, q in zip(old, new, strict=True)
            )
            return (rollout.weights * kl).sum()

        blocks = th.autograd.functional.hessian(mean_kl, tuple(p.detach() for p in self.actor))
        rows = [
            [b.reshape(p.numel(), q.numel()) for b, q in zip(row, self.actor, strict=True)]
            for row, p in zip(blocks, self.actor, strict=True)
        ]
        return th.cat([th.cat(row, dim=1) for row in rows])


class _Actor(nn.Module):
    """`functional_call` wants a module's forward."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, inputs: Inputs) -> Any:
        return self.policy.get_distribution(inputs)


def _named(names: list[str], theta: tuple[th.Tensor, ...]) -> dict[str, th.Tensor]:
    return {f"policy.{name}": value for name, value in zip(names, theta, strict=True)}


def _as_list(distribution: Any) -> list[Any]:
    return distribution if isinstance(distribution, list) else [distribution]


def _build_policy(name: str, policy_class: type[ActorCriticPolicy], **policy_kwargs: Any) -> ActorCriticPolicy:
    observation_space, action_space, case_kwargs = CASES[name]
    extractor = DoubleCombined if isinstance(observation_space, spaces.Dict) else DoubleFlatten
    kwargs = {"net_arch": [5], "features_extractor_class": extractor, **case_kwargs, **policy_kwargs}
    policy = policy_class(observation_space, action_space, lambda _: 1e-2, **kwargs).double()
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * th.randn_like(parameter))
    if policy.use_sde:
        policy.reset_noise()
    policy.set_training_mode(False)
    return policy


def _random_inputs(space: spaces.Space, n_states: int) -> Inputs:
    if isinstance(space, spaces.Dict):
        return {key: _random_inputs(subspace, n_states) for key, subspace in space.items()}
    if isinstance(space, spaces.Discrete):
        return th.randint(int(space.n), (n_states,))
    return th.randn(n_states, *space.shape)


@pytest.fixture
def make_case() -> Callable[..., Case]:
    """Build the case of a name; the number of states, the policy's class and its arguments may be changed."""

    def make(
        name: str, *, policy_class: type[ActorCriticPolicy] = ActorCriticPolicy, n_states: int = N_STATES, **policy_kwargs: Any
    ) -> Case:
        th.manual_seed(0)
        if name in USER_POLICIES:
            name, policy_class = "box", USER_POLICIES[name]
        policy = _build_policy(name, policy_class, **policy_kwargs)
        inputs = _random_inputs(policy.observation_space, n_states)
        with th.no_grad():
            actions = policy.get_distribution(inputs).sample()
        advantages, returns = th.randn(2, n_states, dtype=th.float64)
        weights = th.full((n_states,), 1.0 / n_states, dtype=th.float64)
        is_critics = ("value_net", "mlp_extractor.value_net", "vf_features_extractor")
        actor = [p for name, p in policy.named_parameters() if not name.startswith(is_critics)]
        return Case(policy, actor, RolloutBatch(inputs, actions, advantages, returns, weights))

    return make


@pytest.fixture(autouse=True)
def keep_validation() -> Iterator[None]:
    """Restore torch's default, which torch.compile changes for good."""
    before = th.distributions.Distribution._validate_args
    yield
    th.distributions.Distribution.set_default_validate_args(before)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, make_case: Callable[..., Case]) -> Case:
    """One case of each kind."""
    return make_case(request.param)


@pytest.fixture(params=USER_POLICIES)
def user_case(request: pytest.FixtureRequest, make_case: Callable[..., Case]) -> Case:
    """One case of each of a user's own policies."""
    return make_case(request.param)


@pytest.fixture
def learned_extractor() -> dict[str, Any]:
    """Arguments for :func:`make_case` that give the policy an extractor with parameters."""
    return {"features_extractor_class": LearnedExtractor}
