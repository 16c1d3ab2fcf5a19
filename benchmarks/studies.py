"""The studies of ``compare.py``: what is trained on what, with which settings."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import gymnasium as gym
import sb3_contrib
from envs import WITHOUT_VELOCITIES
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiBinary, InvalidActionEnvMultiDiscrete
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor, nn
from torch.distributions import AffineTransform, Beta, Normal, TransformedDistribution
from torch.nn import functional as F

import sb3_trpo
from sb3_trpo.saving.sb3_contrib import kl_dimensions

Settings = dict[str, Any]


class Case(NamedTuple):
    """
    An algorithm on a task.

    :param algorithm: class
    :param settings: constructor arguments
    :param steps: environment steps of training
    :param n_envs: number of environments
    :param make: makes one environment; None for ``gym.make`` with the name of the task
    :param normalize: use ``VecNormalize``
    :param n_eval_episodes: deterministic episodes at the end
    :param n_evals: evaluations during training; None for none
    """

    algorithm: type[OnPolicyAlgorithm]
    settings: Settings
    steps: int
    n_envs: int
    make: Callable[[], gym.Env] | None = None
    normalize: bool = False
    n_eval_episodes: int = 20
    n_evals: int | None = None


#: Cases by name of the cell and of the task.
Study = dict[tuple[str, str], Case]

#: Trust region and first standard deviation of the runs that were made before the defaults changed.
TARGET_KL = 0.05
SB3S_STD = {"log_std_init": 0.0}


def spaces() -> Study:
    """
    Return every action space and Dict observations, beside sb3-contrib's TRPO.

    Both have the same rollouts, and one trust region in terms of the KL that they use: sb3-contrib averages it over
    action dimensions. Each has its own default critic.
    """
    mlp = {"policy": "MlpPolicy", "n_steps": 256}
    tasks: dict[str, tuple[int, Settings]] = {
        "CartPole-v1": (30_000, mlp),
        "Pendulum-v1": (60_000, {**mlp, "gamma": 0.9, "use_sde": True}),
        "Chase-v0": (30_000, {**mlp, "gamma": 0.9}),
        "Hover-v0": (30_000, {**mlp, "gamma": 0.95}),
        "Errands-v0": (30_000, {"policy": "MultiInputPolicy", "n_steps": 256, "gamma": 0.9}),
    }
    study = {}
    for env, (steps, settings) in tasks.items():
        dimensions = kl_dimensions(gym.make(env).action_space)
        for cell, algorithm, divisor in (
            ("sb3_trpo", sb3_trpo.TRPO, 1),
            ("sb3_contrib", sb3_contrib.TRPO, dimensions),
        ):
            region = {"target_kl": TARGET_KL / divisor, "cg_damping": 0.1 / divisor}
            study[cell, env] = Case(algorithm, {**settings, **region, "policy_kwargs": SB3S_STD}, steps, 4)
    return study


def pixels() -> Study:
    """
    Return policies for images: one features extractor for actor and critic, or one each.

    TRPO's critic must not move the policy, so it cannot train an extractor that it shares. sb3-contrib's TRPO shares it; ours
    does on request.
    """
    settings = {"policy": "CnnPolicy", "n_steps": 32, "gamma": 0.9, "target_kl": TARGET_KL}
    variants: dict[str, tuple[type[OnPolicyAlgorithm], Settings]] = {
        "sb3_trpo, one each": (sb3_trpo.TRPO, {}),
        "sb3_trpo, one each, small steps, minibatches": (
            sb3_trpo.TRPO,
            {"target_kl": 0.02, "critic_method": "minibatch"},
        ),
        "sb3_trpo, shared": (sb3_trpo.TRPO, {"policy_kwargs": {"share_features_extractor": True}}),
        "sb3_contrib, shared": (sb3_contrib.TRPO, {}),
    }
    return {
        (cell, "Catch-v0"): Case(algorithm, {**settings, **arguments}, 10_240, 8, n_eval_episodes=200)
        for cell, (algorithm, arguments) in variants.items()
    }


def beta(outputs: Tensor) -> TransformedDistribution:
    """Beta distributions on [-1, 1], with one mode each."""
    alpha, beta = (1.0 + F.softplus(outputs)).chunk(2, dim=-1)
    return TransformedDistribution(Beta(alpha, beta), AffineTransform(-1.0, 2.0))


def state_dependent_gaussian(outputs: Tensor) -> Normal:
    """Normal distributions whose standard deviations depend on the state."""
    mean, scale = outputs.chunk(2, dim=-1)
    return Normal(mean, F.softplus(scale) + 1e-3)


def options() -> Study:
    """Return bounded actions, custom distributions and the natural policy gradient."""
    pendulum = {"policy": "MlpPolicy", "n_steps": 256, "gamma": 0.9, "target_kl": TARGET_KL, "policy_kwargs": SB3S_STD}
    variants: dict[str, Settings] = {
        "Gaussian, clipped by SB3": {},
        'action_bound="clip"': {"action_bound": "clip"},
        'action_bound="tanh"': {"action_bound": "tanh"},
        "Beta": {"action_bound": "clip", "policy_kwargs": {"dist_fn": beta}},
        "state-dependent Gaussian": {"policy_kwargs": {"dist_fn": state_dependent_gaussian}},
    }
    cheetah = {"policy": "MlpPolicy", "n_steps": 1024, "target_kl": 0.035, "policy_kwargs": SB3S_STD}
    study = {
        (cell, "Pendulum-v1"): Case(sb3_trpo.TRPO, {**pendulum, **arguments}, 100_000, 4)
        for cell, arguments in variants.items()
    }
    for algorithm in (sb3_trpo.NPG, sb3_trpo.TRPO):
        study[algorithm.__name__, "HalfCheetah-v5"] = Case(algorithm, cheetah, 500_000, 2, normalize=True)
    return study


#: Networks of both algorithms of ``recurrent``.
LSTM: Settings = {
    "policy": "MlpLstmPolicy",
    "policy_kwargs": {
        "ortho_init": False,
        "activation_fn": nn.ReLU,
        "lstm_hidden_size": 64,
        "enable_critic_lstm": True,
        "net_arch": {"pi": [64], "vf": [64]},
    },
}
#: Networks of RL Zoo's RecurrentPPO for PyBullet's robots.
ROBOT_LSTM = {
    "ortho_init": False,
    "activation_fn": nn.ReLU,
    "lstm_hidden_size": 128,
    "enable_critic_lstm": True,
    "net_arch": {"pi": [], "vf": []},
}


def recurrent() -> Study:
    """
    Return tasks that need a memory, for RecurrentTRPO and sb3-contrib's RecurrentPPO.

    Velocities are hidden, or a cue must be named eight steps later. RecurrentTRPO has the settings of
    ``zoo_hyperparams/trpo_lstm.yml``, chosen on the seeds 0 to 4 and from 100 on: report 5 to 9. RecurrentPPO has RL Zoo's,
    and its defaults on ``Recall``.
    """
    sde = {"use_sde": True, "sde_sample_freq": 4}
    ours: dict[str, Settings] = {
        "CartPoleNoVel-v1": {
            "n_steps": 32,
            "gamma": 0.98,
            "gae_lambda": 0.8,
            "target_kl": LinearSchedule(0.05, 0.0, 1.0),
            "ent_coef": 0.01,
            "n_critic_steps": 3,
        },
        "PendulumNoVel-v1": {
            "n_steps": 200,
            "gamma": 0.9,
            "gae_lambda": 0.95,
            "target_kl": LinearSchedule(0.1, 0.0, 1.0),
            "cg_damping": 0.03,
            "n_critic_steps": 3,
            **sde,
        },
        "Recall-v0": {"n_steps": 64, "target_kl": LinearSchedule(0.05, 0.0, 1.0), "cg_damping": 0.01, "ent_coef": 0.1},
        "LunarLanderNoVel-v3": {"n_steps": 64, "target_kl": 0.03, "ent_coef": 0.01},
        "HalfCheetahNoVel-v5": {
            "n_steps": 64,
            "target_kl": LinearSchedule(0.05, 0.0, 1.0),
            "policy_kwargs": {**LSTM["policy_kwargs"], "log_std_init": -1.0},
        },
    }
    ppo: dict[str, Settings] = {
        "CartPoleNoVel-v1": {
            "n_steps": 32,
            "batch_size": 256,
            "gae_lambda": 0.8,
            "gamma": 0.98,
            "n_epochs": 20,
            "learning_rate": LinearSchedule(1e-3, 0.0, 1.0),
            "clip_range": LinearSchedule(0.2, 0.0, 1.0),
        },
        "PendulumNoVel-v1": {
            "n_steps": 1024,
            "gae_lambda": 0.95,
            "gamma": 0.9,
            "n_epochs": 10,
            "learning_rate": 1e-3,
            **sde,
        },
        "Recall-v0": {"n_steps": 64},
        "LunarLanderNoVel-v3": {
            "n_steps": 512,
            "batch_size": 128,
            "gae_lambda": 0.98,
            "gamma": 0.999,
            "n_epochs": 4,
            "ent_coef": 0.01,
        },
        "HalfCheetahNoVel-v5": {"n_steps": 256, "batch_size": 128, "gae_lambda": 0.9, "policy_kwargs": ROBOT_LSTM},
    }
    budgets = {
        "CartPoleNoVel-v1": (30_000, 8, 8),
        "PendulumNoVel-v1": (60_000, 8, 4),
        "Recall-v0": (30_000, 8, 8),
        "LunarLanderNoVel-v3": (300_000, 16, 32),
        "HalfCheetahNoVel-v5": (200_000, 8, 16),
    }
    study = {}
    for env, (steps, our_envs, ppo_envs) in budgets.items():
        make = WITHOUT_VELOCITIES.get(env)
        for algorithm, settings, n_envs in (
            (sb3_trpo.RecurrentTRPO, ours[env], our_envs),
            (sb3_contrib.RecurrentPPO, ppo[env], ppo_envs),
        ):
            arguments = {**LSTM, **settings}
            study[algorithm.__name__, env] = Case(algorithm, arguments, steps, n_envs, make, normalize=True, n_evals=10)
    return study


def maskable() -> Study:
    """
    Return tasks with invalid actions, for MaskableTRPO and sb3-contrib's MaskablePPO.

    sb3-contrib's own environments, and ``Placement`` with 64 actions. Both algorithms have the same rollouts and discount, and
    their defaults otherwise.
    """
    tasks: dict[str, tuple[Callable[[], gym.Env] | None, int, float]] = {
        "Discrete(20), 15 invalid": (partial(InvalidActionEnvDiscrete, 20, n_invalid_actions=15), 10_000, 0.4),
        "MultiDiscrete([8, 6]), 7 invalid": (
            partial(InvalidActionEnvMultiDiscrete, [8, 6], n_invalid_actions=7),
            10_000,
            0.4,
        ),
        "MultiBinary(6), 4 invalid": (partial(InvalidActionEnvMultiBinary, 6, n_invalid_actions=4), 10_000, 0.4),
        "Placement-v0": (None, 40_000, 0.99),
    }
    regions: dict[type[OnPolicyAlgorithm], Settings] = {
        sb3_trpo.MaskableTRPO: {"target_kl": TARGET_KL},
        sb3_contrib.MaskablePPO: {},
    }
    return {
        (algorithm.__name__, env): Case(
            algorithm, {"policy": "MlpPolicy", "n_steps": 256, "gamma": gamma, **region}, steps, 4, make
        )
        for env, (make, steps, gamma) in tasks.items()
        for algorithm, region in regions.items()
    }


def critic() -> Study:
    """Return the Gauss-Newton and the minibatch critic, on three MuJoCo tasks and two rollout shapes."""
    shapes: dict[str, tuple[int, Settings]] = {
        "2x1024": (2, {"n_steps": 1024, "target_kl": 0.035, "policy_kwargs": SB3S_STD}),
        "16x64": (16, {"n_steps": 64, "target_kl": 0.0125, "policy_kwargs": {"log_std_init": -0.5}}),
    }
    batch_sizes = {"2x1024": 128, "16x64": 1024}
    study = {}
    for env, (shape, (n_envs, settings)) in itertools.product(("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5"), shapes.items()):
        methods: dict[str, Settings] = {
            "gauss_newton": {},
            "minibatch": {"critic_method": "minibatch", "n_critic_updates": 20, "batch_size": batch_sizes[shape]},
        }
        for method, arguments in methods.items():
            case = {"policy": "MlpPolicy", **settings, **arguments}
            study[f"{method} {shape}", env] = Case(sb3_trpo.TRPO, case, 500_000, n_envs, normalize=True, n_eval_episodes=10)
    return study


STUDIES: dict[str, Callable[[], Study]] = {
    make.__name__: make for make in (spaces, pixels, options, recurrent, maskable, critic)
}
