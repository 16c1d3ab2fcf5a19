"""The inputs of the equality harness: environments, modules, preparations of a policy and callbacks that users bring."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EventCallback
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import weight_norm as old_weight_norm

VECTOR = spaces.Box(-np.inf, np.inf, (6,))
BOX = spaces.Box(-0.5, 0.5, (2,))
DICT = spaces.Dict({"place": spaces.Box(-np.inf, np.inf, (3,)), "gear": spaces.Discrete(4), "flags": spaces.MultiBinary(2)})
HALF = spaces.Box(-np.inf, np.inf, (6,), np.float16)
DOUBLE = spaces.Box(-np.inf, np.inf, (6,), np.float64)


def image(n_channels: int) -> spaces.Box:
    return spaces.Box(0, 255, (36, 36, n_channels), np.uint8)


class Wander(gym.Env):
    """
    Random observations, rewards that depend on the action, and valid actions where there are some to choose from.

    :param observation_space: of the observations, which are float64 for float32 spaces, as in many environments
    :param action_space: of the actions
    :param one_array: write all observations into one array, in place
    :param nested: keep an object in ``info`` that later steps change
    :param scale: of the observations
    """

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space, one_array: bool, nested: bool, scale: float
    ) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        self.one_array, self.nested, self.scale = one_array, nested, scale
        self.array: Any = None
        self.history: list[int] = []

    def _draw(self, space: spaces.Space) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: self._draw(subspace) for key, subspace in space.items()}
        if isinstance(space, spaces.Discrete):
            return int(self.np_random.integers(space.n))
        if isinstance(space, (spaces.MultiBinary, spaces.MultiDiscrete)):
            return self.np_random.integers(0, 2, space.shape).astype(space.dtype)
        if space.dtype == np.uint8:
            return self.np_random.integers(0, 256, space.shape).astype(np.uint8)
        values = self.scale * self.np_random.normal(size=space.shape)
        return values.astype(np.float16) if space.dtype == np.float16 else values

    def _observe(self) -> Any:
        observation = self._draw(self.observation_space)
        if not self.one_array:
            return observation
        if self.array is None:
            self.array = observation
        elif isinstance(observation, dict):
            self.array.update(observation)
        else:
            self.array[...] = observation
        return self.array

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.history.clear()
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        draw = self.np_random.random()
        self.history.append(int(100 * draw))
        info = {"draw": draw, "history": self.history} if self.nested else {"draw": draw}
        return self._observe(), float(np.sum(action)) + draw, draw < 0.1, False, info

    def action_masks(self) -> np.ndarray:
        n = int(np.sum(getattr(self.action_space, "nvec", getattr(self.action_space, "n", 0))))
        masks = np.ones(2 * n if isinstance(self.action_space, spaces.MultiBinary) else n, dtype=bool)
        masks[len(self.history) % 2] = False
        return masks


# ---- modules


class Extractor(BaseFeaturesExtractor):
    """A user's features extractor, of eight features."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space, 8)
        self.layer = nn.Linear(6, 8)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.tanh(self.layer(observations))


class Objects(Extractor):
    """Folds three objects into the batch, and takes their mean."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space)
        self.layer = nn.Linear(2, 8)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        n = len(observations)
        return th.tanh(self.layer(observations.reshape(n * 3, 2))).view(n, 3, -1).mean(1)


class SequenceFirst(Objects):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.tanh(self.layer(observations.view(-1, 3, 2).transpose(0, 1))).mean(0)


class Transformer(Objects):
    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space)
        self.attention = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True), 1)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.attention(self.layer(observations.view(-1, 3, 2))).mean(1)


class SmallCNN(BaseFeaturesExtractor):
    """A user's extractor of images, of layers one after another; few parameters, for dense matrices."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space, 8)
        self.net = nn.Sequential(*self.modules_of(observation_space.shape[0]))

    def modules_of(self, n_channels: int) -> list[nn.Module]:
        return [
            nn.Conv2d(n_channels, 2, 8, 7),
            nn.Tanh(),
            nn.Conv2d(2, 2, 2, 2, padding=1),
            nn.ELU(),
            nn.Flatten(),
            nn.Linear(18, 8),
            nn.Tanh(),
        ]

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.net(observations)


class PooledCNN(SmallCNN):
    def modules_of(self, n_channels: int) -> list[nn.Module]:
        return [
            nn.Conv2d(n_channels, 4, 4, 4),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4, 8),
            nn.Tanh(),
        ]


class NormedCNN(SmallCNN):
    def modules_of(self, n_channels: int) -> list[nn.Module]:
        return [
            nn.Conv2d(n_channels, 2, 8, 7),
            nn.Tanh(),
            nn.Flatten(),
            nn.LayerNorm(50),
            nn.Linear(50, 1),
            nn.Linear(1, 8),
            nn.Tanh(),
        ]


class ResidualCNN(SmallCNN):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        features = super().forward(observations)
        return features + th.sin(features)


class OnConstant(Extractor):
    """Calls a layer on something that is not the observation."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space)
        self.embedding = nn.Linear(1, 8)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations) + self.embedding(observations.new_ones(1, 1))


class ByKeyword(Extractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.tanh(self.layer(input=observations))


class TwiceWithoutGradient(Extractor):
    """Calls its layer under ``no_grad`` as well."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        with th.no_grad():
            scale = self.layer(observations).abs().amax(dim=1, keepdim=True)
        return th.tanh(self.layer(observations) / (1.0 + scale))


class Parametrized(Extractor):
    wrap: Callable[[nn.Module], nn.Module] = staticmethod(parametrizations.spectral_norm)

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space)
        self.layer = type(self).wrap(self.layer)


class WeightNorm(Parametrized):
    wrap = staticmethod(parametrizations.weight_norm)


class OldWeightNorm(Parametrized):
    wrap = staticmethod(old_weight_norm)


class Orthogonal(Parametrized):
    wrap = staticmethod(parametrizations.orthogonal)


class ScaledLinear(nn.Linear):
    """A subclass of Linear with a parameter more."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(th.tensor(0.5))

    def forward(self, input: th.Tensor) -> th.Tensor:
        return self.gain * super().forward(input)


class WithScaledLinear(Extractor):
    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space)
        self.layer = ScaledLinear(6, 8)


class Autocast(Extractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        with th.autocast("cpu", dtype=th.bfloat16):
            features = super().forward(observations)
        return features.float()


class OneDoubleLayer(Extractor):
    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space)
        self.layer = self.layer.double()

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations.double()).float()


class Counting(Extractor):
    """Changes with every call, by a number of Python's."""

    calls = 0

    def forward(self, observations: th.Tensor) -> th.Tensor:
        self.calls += 1
        return super().forward(observations) / self.calls**0.1


class RunningMean(Extractor):
    """Centers by a running mean that every call moves."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space)
        self.register_buffer("mean", th.zeros(6))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        with th.no_grad():
            self.mean.lerp_(observations.mean(dim=0), 0.1)
        return super().forward(observations - self.mean)


class Noisy(Extractor):
    """Draws random numbers in every call."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations + 0.5 * th.randn_like(observations))


class WithBatchNorm(Extractor):
    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(self.norm(observations))


class WithDropout(Extractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return nn.functional.dropout(super().forward(observations), 0.5, self.training)


class MaskingNaN(Extractor):
    """Handles missing numbers itself."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(th.where(observations.isfinite(), observations, 0.0))


class OwnForward(ActorCriticPolicy):
    """SB3's way of acting, written anew."""

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        distribution = self.get_distribution(obs)
        actions = distribution.get_actions(deterministic)
        return actions, self.predict_values(obs), distribution.log_prob(actions)


class OwnDistribution(ActorCriticPolicy):
    """Other means, in acting, evaluating and predicting alike."""

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
        return self.action_dist.proba_distribution(th.tanh(self.action_net(latent_pi)), self.log_std)


class OwnGetDistribution(ActorCriticPolicy):
    """Evaluates by other features than SB3's."""

    def extract_features(self, obs: Any, features_extractor: Any = None) -> Any:
        return super().extract_features(0.5 * obs, features_extractor)

    def get_distribution(self, obs: Any) -> Any:
        return super().get_distribution(0.5 * obs)

    def predict_values(self, obs: Any) -> th.Tensor:
        return super().predict_values(0.5 * obs)


class OwnFeatures(ActorCriticPolicy):
    """Features of its own in acting, which SB3's ``get_distribution`` does not ask for."""

    def extract_features(self, obs: Any, features_extractor: Any = None) -> Any:
        features = super().extract_features(obs, features_extractor)
        return tuple(map(th.sin, features)) if isinstance(features, tuple) else th.sin(features)


class WiderGaussian(DiagGaussianDistribution):
    def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor) -> "WiderGaussian":
        super().proba_distribution(mean_actions, log_std + 0.5)
        return self


class OwnFamily(ActorCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_dist = WiderGaussian(2)


class OwnNetworks(ActorCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        self.mlp_extractor.policy_net.append(nn.LayerNorm(self.mlp_extractor.latent_dim_pi))


# ---- preparations of a policy


def double_output(module: nn.Module, arguments: Any, output: th.Tensor) -> th.Tensor:
    return 2.0 * output


def halve_input(module: nn.Module, arguments: Any) -> Any:
    return (0.5 * arguments[0], *arguments[1:])


def first_layer(policy: Any) -> nn.Module:
    return policy.mlp_extractor.policy_net[0]


def hook_layer(policy: Any) -> None:
    first_layer(policy).register_forward_hook(double_output)


def pre_hook_layer(policy: Any) -> None:
    first_layer(policy).register_forward_pre_hook(halve_input)


def hook_critic(policy: Any) -> None:
    policy.value_net.register_forward_hook(double_output)


def hook_networks(policy: Any) -> None:
    policy.action_net.register_forward_pre_hook(halve_input)


def prune_layer(policy: Any) -> None:
    prune.l1_unstructured(first_layer(policy), "weight", 0.5)


def patch_layer(policy: Any) -> None:
    layer = first_layer(policy)
    layer.forward = lambda x: nn.functional.linear(x, 2.0 * layer.weight, layer.bias)


def patch_forward_actor(policy: Any) -> None:
    networks = policy.mlp_extractor
    networks.forward_actor = lambda features: 0.5 * networks.policy_net(features)


def patch_activation(policy: Any) -> None:
    policy.mlp_extractor.policy_net[1].forward = th.sin


def patch_extractor(policy: Any) -> None:
    extractor = policy.features_extractor
    extractor.forward = lambda obs: 0.5 * extractor.flatten(obs)


def patch_log_prob(policy: Any) -> None:
    own = policy._get_action_dist_from_latent
    policy._get_action_dist_from_latent = lambda latent: own(0.5 * latent)


def patch_extract_features(policy: Any) -> None:
    own = policy.extract_features
    policy.extract_features = lambda obs, *extractor: own(0.5 * obs, *extractor)


def replace_by_identity(policy: Any) -> None:
    policy.mlp_extractor.policy_net = nn.Identity()
    policy.action_net = nn.Linear(6, policy.action_net.out_features)


def replace_by_module(policy: Any) -> None:
    with th.random.fork_rng():
        th.manual_seed(1)
        policy.mlp_extractor.policy_net = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 5)))
        policy.action_net = nn.Linear(5, policy.action_net.out_features)


def replace_flatten(policy: Any) -> None:
    policy.features_extractor.flatten = nn.Sequential(nn.Flatten(), nn.Hardtanh())


def replace_pi_extractor(policy: Any) -> None:
    class Half(FlattenExtractor):
        def forward(self, observations: th.Tensor) -> th.Tensor:
            return 0.5 * super().forward(observations)

    policy.features_extractor = policy.pi_features_extractor = policy.vf_features_extractor = Half(policy.observation_space)


def compile_layer(policy: Any) -> None:
    first_layer(policy).compile(backend="eager")


def compile_networks(policy: Any) -> None:
    policy.mlp_extractor.policy_net = th.compile(policy.mlp_extractor.policy_net, backend="eager")


def share_data(policy: Any) -> None:
    """A weight that is a view into a larger tensor, column by column."""
    layer = first_layer(policy)
    layer.weight.data = layer.weight.detach().t().contiguous().t()


def one_layer_double(policy: Any) -> None:
    class ToDouble(nn.Module):
        def forward(self, x: th.Tensor) -> th.Tensor:
            return x.double()

    class ToFloat(nn.Module):
        def forward(self, x: th.Tensor) -> th.Tensor:
            return x.float()

    net = policy.mlp_extractor.policy_net
    policy.mlp_extractor.policy_net = nn.Sequential(net[0], net[1], ToDouble(), nn.Linear(5, 5).double(), ToFloat())


# ---- callbacks


class Reader(BaseCallback):
    """Keeps a copy of what it finds at each step, read in one of the ways that users have."""

    def __init__(self, read: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        super().__init__()
        self.read = read
        self.found: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        self.found.append({name: clone(value) for name, value in self.read(self.locals).items()})
        return True


def clone(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: clone(item) for key, item in value.items()}
    return value.clone() if isinstance(value, th.Tensor) else np.copy(value)


NAMES = ("obs_tensor", "values", "log_probs")
READS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "by_key": lambda variables: {name: variables[name] for name in NAMES},
    "by_get": lambda variables: {name: variables.get(name) for name in NAMES},
    "if_there": lambda variables: {name: variables[name] for name in NAMES if name in variables},
    "by_items": lambda variables: {name: value for name, value in variables.items() if name in NAMES},
    "by_copy": lambda variables: {name: dict(variables)[name] for name in NAMES},
    "by_star": lambda variables: {name: dict(**variables)[name] for name in NAMES},
    "one_of_them": lambda variables: {"values": variables["values"]},
}


class Changer(BaseCallback):
    """Changes the policy in the middle of a rollout."""

    def __init__(self, change: Callable[[Any], None], at: int = 7, every_step: bool = False) -> None:
        super().__init__()
        self.change, self.at, self.every_step = change, at, every_step

    def _on_step(self) -> bool:
        if self.every_step or self.n_calls == self.at:
            self.change(self.model)
        return True


class ArrayChanger(BaseCallback):
    """Changes the policy through an array that shares its memory, without calling torch at that step."""

    def _init_callback(self) -> None:
        self.log_std = self.model.policy.log_std.detach().numpy()

    def _on_step(self) -> bool:
        if self.n_calls == 7:
            self.log_std.fill(-1.0)
        return True


def fill_std(model: Any) -> None:
    with th.no_grad():
        model.policy.log_std.fill_(-1.0)


def fill_std_data(model: Any) -> None:
    model.policy.log_std.data.fill_(-1.0)


def point_std_data(model: Any) -> None:
    model.policy.log_std.data = th.full_like(model.policy.log_std, -1.0)


def replace_std(model: Any) -> None:
    model.policy.log_std = nn.Parameter(th.full_like(model.policy.log_std, -1.0))


def anneal_std(model: Any) -> None:
    model.policy.log_std.data.sub_(0.05)


def load_parameters(model: Any) -> None:
    state = model.policy.state_dict()
    model.set_parameters({"policy": {name: 0.5 * value for name, value in state.items()}}, exact_match=False)


def step_optimizer(model: Any) -> None:
    for parameter in model.policy.parameters():
        parameter.grad = th.ones_like(parameter)
    for group in model.policy.optimizer.param_groups:
        group["lr"] = 0.05
    model.policy.optimizer.step()


def write_weight(model: Any) -> None:
    first_layer(model.policy).weight.data[0, 0] += 3.0


def write_by_numpy(model: Any) -> None:
    first_layer(model.policy).weight.detach().numpy()[...] *= 0.5


def change_critic(model: Any) -> None:
    model.policy.value_net.weight.data.mul_(3.0)


def of_policy(change: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda model: change(model.policy)


def listed(*callbacks: BaseCallback) -> BaseCallback:
    return CallbackList(list(callbacks))


def nested(*callbacks: BaseCallback) -> BaseCallback:
    """Inside an event callback that calls them at every step."""

    class Always(EventCallback):
        def _on_step(self) -> bool:
            return self._on_event()

    return CallbackList([Always(callback) for callback in callbacks])
