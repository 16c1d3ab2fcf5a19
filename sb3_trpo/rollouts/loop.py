"""The loop that fills the rollout buffer: SB3's, without evaluating the policy at every step."""

from typing import TYPE_CHECKING

from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo.rollouts.actor import make_actor
from sb3_trpo.rollouts.checks import EnvOutputCheck
from sb3_trpo.rollouts.collect import find_truncations, widen_observations, write_step
from sb3_trpo.rollouts.fast_step import Observations, copy_observations, fast_step_fn
from sb3_trpo.rollouts.samplers import action_transform

if TYPE_CHECKING:
    from sb3_trpo.trpo import TRPO


def fill_buffer(
    self: "TRPO",
    env: VecEnv,
    callback: BaseCallback,
    rollout_buffer: RolloutBuffer,
    n_rollout_steps: int,
    check: EnvOutputCheck,
) -> bool:
    """
    Collect a rollout.

    Callbacks read the local variables, so those that SB3's loop has too, ``self`` among them, keep SB3's names.

    :param self: the algorithm
    :param env: the training environment
    :param callback: called at every step, and at the rollout's start and end
    :param rollout_buffer: buffer to fill
    :param n_rollout_steps: steps to take in each environment
    :param check: checks what the environment returns
    :return: False if the callback stopped the training
    :raises NonFiniteError: the environment returned a NaN or an infinity
    """
    self.policy.set_training_mode(False)
    rollout_buffer.reset()
    self._last_obs = copy_observations(self._last_obs)  # type: ignore[arg-type]
    widen_observations(rollout_buffer, self._last_obs)
    callback.on_rollout_start()
    actor = make_actor(
        self.adapter,
        env,
        callback,
        self._last_obs,
        n_rollout_steps,
        sde_sample_freq=self.sde_sample_freq,
        value_scale=self._value_scale,
        chunk_size=self._chunk_size,
    )
    act, to_env, step = actor.act, action_transform(self.policy), fast_step_fn(env)

    n_steps = 0
    while n_steps < n_rollout_steps:
        obs: Observations = self._last_obs  # type: ignore[assignment]
        rollout_buffer.episode_starts[n_steps] = self._last_episode_starts
        actions = act(obs, n_steps)
        if not self.check_observations:
            check.check_actions(actions)
        clipped_actions = to_env(actions)
        new_obs, rewards, dones, infos = step(clipped_actions)
        check(new_obs, rewards)
        self.num_timesteps += env.num_envs
        callback.update_locals(locals())
        if not callback.on_step():
            return False

        self._update_info_buffer(infos, dones)
        write_step(rollout_buffer, n_steps, obs, actions, rewards)
        if dones.any():
            truncations = find_truncations(n_steps, dones, infos)
            check.check_truncations(truncations)
            actor.add_truncations(truncations)
        self._last_obs, self._last_episode_starts = new_obs, dones  # type: ignore[assignment]
        n_steps += 1

    actor.finish(self._last_obs, dones)  # type: ignore[arg-type]
    check.check_evaluation(rollout_buffer)
    callback.update_locals({**locals(), **actor.variables()})
    callback.on_rollout_end()
    return True
