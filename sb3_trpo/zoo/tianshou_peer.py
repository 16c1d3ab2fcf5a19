"""Tianshou's TRPO for comparisons, as its MuJoCo example builds it. Tianshou is not a dependency of this package."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from torch import nn

#: Tianshou's example for MuJoCo (examples/mujoco/mujoco_trpo.py): the shape of its rollouts, and the algorithm's arguments.
TIANSHOU_SHAPE = {"n_envs": 16, "n_steps": 64}
TIANSHOU_TRPO: dict[str, Any] = {
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "return_scaling": True,
    "advantage_normalization": True,
    "optim_critic_iters": 20,
    "max_kl": 0.01,
    "backtrack_coeff": 0.8,
    "max_backtracks": 10,
}


def tianshou_trpo(observation_space: spaces.Box, action_space: spaces.Box, hidden: tuple[int, ...] = (64, 64)) -> Any:
    """
    Build Tianshou's TRPO.

    :param observation_space: of the environment
    :param action_space: of the environment
    :param hidden: sizes of the hidden layers
    :return: the algorithm; its policy acts deterministically outside of training
    """
    from tianshou.algorithm import TRPO
    from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.utils.net.common import Net
    from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic
    from torch.distributions import Distribution, Independent, Normal

    def network() -> Net:
        return Net(state_shape=observation_space.shape, hidden_sizes=hidden, activation=nn.Tanh)

    def gaussian(loc_scale: tuple[th.Tensor, th.Tensor]) -> Distribution:
        return Independent(Normal(*loc_scale), 1)

    actor = ContinuousActorProbabilistic(preprocess_net=network(), action_shape=action_space.shape, unbounded=True)
    critic = ContinuousCritic(preprocess_net=network())
    nn.init.constant_(actor.sigma_param, -0.5)
    for module in [*actor.modules(), *critic.modules()]:
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight, gain=np.sqrt(2))
            nn.init.zeros_(module.bias)
    for module in actor.mu.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(0.01)
    policy = ProbabilisticActorPolicy(
        actor=actor,
        dist_fn=gaussian,
        action_scaling=True,
        action_bound_method="clip",
        action_space=action_space,
        deterministic_eval=True,
    )
    return TRPO(policy=policy, critic=critic, optim=AdamOptimizerFactory(lr=1e-3), **TIANSHOU_TRPO)


def train(
    env_id: str,
    seed: int,
    n_timesteps: int,
    n_eval_episodes: int,
    after_update: Callable[[int, Callable[[], np.ndarray]], None],
) -> None:
    """
    Train with normalized observations, as the example does, without its logs.

    :param env_id: registered id; Box observations and actions
    :param seed: of environments and networks
    :param n_timesteps: environment steps; rollouts are always completed
    :param n_eval_episodes: episodes of an evaluation
    :param after_update: called after each update with the steps so far, and a function that evaluates and gives the returns
    """
    from tianshou.data import Collector, VectorReplayBuffer
    from tianshou.env import DummyVectorEnv, VectorEnvNormObs
    from tianshou.utils.torch_utils import policy_within_training_step

    n_envs, n_steps = TIANSHOU_SHAPE["n_envs"], TIANSHOU_SHAPE["n_steps"]
    env = VectorEnvNormObs(DummyVectorEnv([lambda: gym.make(env_id) for _ in range(n_envs)]))
    env.seed(seed)
    eval_env = VectorEnvNormObs(DummyVectorEnv([lambda: gym.make(env_id)]), update_obs_rms=False)
    eval_env.seed(seed + 1_000)
    eval_env.set_obs_rms(env.get_obs_rms())
    single = gym.make(env_id)
    algorithm = tianshou_trpo(single.observation_space, single.action_space)  # type: ignore[arg-type]
    collector = Collector(algorithm, env, VectorReplayBuffer(n_envs * n_steps, n_envs), exploration_noise=True)
    evaluator = Collector(algorithm, eval_env)
    collector.reset()

    def evaluate() -> np.ndarray:
        evaluator.reset()
        returns: np.ndarray = evaluator.collect(n_episode=n_eval_episodes).returns
        return returns

    for steps in range(n_envs * n_steps, n_timesteps + n_envs * n_steps, n_envs * n_steps):
        with policy_within_training_step(algorithm.policy):
            collector.collect(n_step=n_envs * n_steps)
            algorithm.update(buffer=collector.buffer, batch_size=None, repeat=1)
        collector.reset_buffer(keep_statistics=True)
        after_update(steps, evaluate)
    env.close()
    eval_env.close()
