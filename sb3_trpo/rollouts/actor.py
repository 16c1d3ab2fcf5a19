"""Acting for the policy during one rollout, and evaluating each step by the policy that took it.

Values and log-probabilities can wait for the end of the rollout, where they cost least, as long as the policy stays what it
is. If it is changed on the way, the steps so far are evaluated by the policy that took them, and the policy is asked for
everything at every step from there on, as in SB3's loop.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo.optim.batch import RolloutBatch
from sb3_trpo.rollouts.acting import ActingPolicy
from sb3_trpo.rollouts.callback_locals import are_known, compute_locals
from sb3_trpo.rollouts.collect import Truncation, bootstrap, write_decisions
from sb3_trpo.rollouts.eligibility import draws_random_numbers, has_known_modules
from sb3_trpo.rollouts.fast_step import Observations
from sb3_trpo.rollouts.policy_state import PolicyState
from sb3_trpo.rollouts.samplers import ActionSampler


class TorchCalls(Protocol):
    """Notices calls of torch."""

    seen: bool


def make_actor(
    adapter: ActingPolicy,
    env: VecEnv,
    callback: BaseCallback,
    observations: Observations,
    n_steps: int,
    *,
    sde_sample_freq: int,
    value_scale: float,
    chunk_size: int | None,
) -> "RolloutActor":
    """
    Decide how to act in the next rollout.

    The policy is watched where somebody may change it: a callback that is neither SB3's nor this package's, or modules
    of the user's own that are called at every step.

    :param adapter: calls the policy
    :param env: the training environment
    :param callback: the outermost callback; it and those inside it find SB3's local variables
    :param observations: the first observations
    :param n_steps: steps in the rollout
    :param sde_sample_freq: sample a new gSDE noise matrix every so many steps; -1 for once a rollout
    :param value_scale: factor of the critic's outputs
    :param chunk_size: most states in one forward pass; None for all
    :return: acts, and fills the buffer's values and log-probabilities
    """
    is_known = are_known(callback)
    sampler = adapter.start_rollout(env, n_steps, sde_sample_freq, not is_known)
    may_change_itself = sampler is not None and sampler.calls_policy and not has_known_modules(adapter.policy)
    if may_change_itself and draws_random_numbers(adapter.policy, obs_as_tensor(observations, adapter.policy.device)):
        sampler = None
    is_watched, torch_calls = may_change_itself or not is_known, getattr(callback, "torch_calls", None)
    actor = RolloutActor(adapter, env, sampler, is_watched, value_scale, chunk_size, torch_calls)
    if not is_known:
        compute_locals(callback, adapter.step_variables, actor.variables)
    return actor


class RolloutActor:
    """
    Acts, and fills the buffer's values and log-probabilities.

    :param adapter: calls the policy
    :param env: the training environment
    :param sampler: samples actions without evaluating them; None to call the policy's ``forward`` at every step
    :param is_watched: whether the policy may change during the rollout
    :param value_scale: factor of the critic's outputs
    :param chunk_size: most states in one forward pass; None for all
    :param torch_calls: has ``seen`` set to True when a tensor may have changed; None if that can be at every step
    """

    def __init__(
        self,
        adapter: ActingPolicy,
        env: VecEnv,
        sampler: ActionSampler | None,
        is_watched: bool,
        value_scale: float,
        chunk_size: int | None,
        torch_calls: TorchCalls | None,
    ) -> None:
        self._adapter = adapter
        self._env = env
        self._buffer: RolloutBuffer = adapter.buffer
        self._policy: BasePolicy = adapter.policy
        self._sampler = sampler
        self._value_scale = value_scale
        self._chunk_size = chunk_size
        self._state = PolicyState(self._policy) if is_watched and sampler is not None else None
        self._torch_calls = None if sampler is None or sampler.calls_policy else torch_calls
        self._n_evaluated = 0
        self._step = -1
        self._observations: Observations = np.empty(0)
        self._actions = np.empty(0)
        self._variables: dict[str, Any] | None = None
        self._pending: list[Truncation] = []
        self._bootstraps: list[tuple[Truncation, float]] = []

    @property
    def act(self) -> Callable[[Observations, int], np.ndarray]:
        """Observations and the number of a step ↦ actions; the sampler itself if nothing more is to be done at a step."""
        return self._act if self._sampler is None or self._state is not None else self._sampler

    def _act(self, observations: Observations, step: int) -> np.ndarray:
        self._follow_policy(step)
        self._step, self._observations, self._variables = step, observations, None
        if self._sampler is not None:
            self._actions = self._sampler(observations, step)
        else:
            self._actions, self._variables = self._adapter.forward(self._env, observations, step)
            self._variables["values"] = self._value_scale * self._variables["values"]
            self._buffer.values[step] = self._variables["values"].flatten().cpu().numpy()
            self._buffer.log_probs[step] = self._variables["log_probs"].cpu().numpy()
            self._n_evaluated = step + 1
        return self._actions

    def variables(self) -> dict[str, Any]:
        """
        Return SB3's local variables of the latest step that come from the policy.

        Those are ``obs_tensor``, ``values``, ``log_probs``, and what the algorithm adds to them.
        """
        if self._variables is None:
            write_decisions(self._buffer, self._step, self._observations, self._actions)
            with th.no_grad(), self._acting_policy():
                values, log_probs = self._adapter.evaluate(self._rows(self._step, self._step + 1))
            values = self._value_scale * values.reshape(-1, 1)
            self._variables = {**self._unevaluated(), "values": values, "log_probs": log_probs}
        return self._variables

    def add_truncations(self, truncations: list[Truncation]) -> None:
        """
        Bootstrap the latest step of episodes that a time limit cut off, now or later.

        :param truncations: the episodes
        """
        self._follow_policy(self._step + 1)
        if self._sampler is not None:
            self._pending += truncations
            return
        for truncation in truncations:  # one by one, as SB3, for networks that change with every call
            self._bootstrap([truncation])

    def finish(self, last_observations: Observations, last_dones: np.ndarray) -> None:
        """
        Fill in what the steps have left out: values, log-probabilities, bootstrapped rewards, advantages and returns.

        :param last_observations: observations after the last step
        :param last_dones: whether the last step ended an episode
        """
        n_steps = self._buffer.pos
        if self._state is not None and self._state.has_changed():
            self._evaluate_by_old_policy(n_steps)
        with th.no_grad():
            self._evaluate_steps(n_steps)
            self._bootstrap(self._pending)
            last_values = self._value_scale * self._adapter.last_values(last_observations, last_dones)
        bootstrap(self._buffer, self._bootstraps, last_values, last_dones)
        if self._variables is None and self._step >= 0:
            log_probs = th.as_tensor(self._buffer.log_probs[self._step], device=self._policy.device)
            self._variables = {**self._unevaluated(), "log_probs": log_probs}
        self._variables = {**(self._variables or {}), "values": last_values}
        self._state = None

    def _follow_policy(self, n_steps: int) -> None:
        """If the policy has changed since it acted, evaluate its steps, and act by SB3's loop from here on."""
        if self._has_changed():
            self._evaluate_by_old_policy(n_steps)
            self._sampler = self._state = None
            self._bootstrap(self._pending)
            self._pending = []

    def _has_changed(self) -> bool:
        if self._state is None:
            return False
        if self._torch_calls is None:
            return self._state.has_changed()
        if not self._torch_calls.seen:
            return self._state.has_changed_structure()
        self._torch_calls.seen = False
        return self._state.has_changed()

    @contextmanager
    def _acting_policy(self) -> Iterator[None]:
        """The policy as it acted, if a callback has changed it since."""
        if self._state is None or not self._state.has_changed():
            yield
        else:
            with self._state.restored():
                yield

    @th.no_grad()
    def _evaluate_by_old_policy(self, n_steps: int) -> None:
        """Evaluate all steps; an episode that ended in the last of them is bootstrapped by the new policy, as in SB3."""
        assert self._state is not None
        with self._state.restored():
            self._evaluate_steps(n_steps)
            ready = [truncation for truncation in self._pending if truncation.step < n_steps - 1]
            self._bootstrap(ready)
            self._pending = self._pending[len(ready) :]

    def _evaluate_steps(self, n_steps: int) -> None:
        first, n_envs = self._n_evaluated, self._buffer.n_envs
        if first == n_steps:
            return
        evaluated = [self._adapter.evaluate(chunk) for chunk in self._rows(first, n_steps).chunks(self._chunk_size)]
        values = self._value_scale * th.cat([values.flatten() for values, _ in evaluated])
        self._buffer.values[first:n_steps] = values.cpu().numpy().reshape(-1, n_envs)
        self._buffer.log_probs[first:n_steps] = th.cat([each for _, each in evaluated]).cpu().numpy().reshape(-1, n_envs)
        self._n_evaluated = n_steps

    @th.no_grad()
    def _bootstrap(self, truncations: list[Truncation]) -> None:
        if truncations:
            values = th.tensor(self._adapter.truncated_values(truncations, self._chunk_size), dtype=th.float32, device="cpu")
            self._bootstraps += zip(truncations, (self._value_scale * values).tolist(), strict=True)

    def _rows(self, first: int, stop: int) -> RolloutBatch:
        n_envs, rollout = self._buffer.n_envs, self._adapter.read()
        is_whole = first == 0 and stop == self._buffer.buffer_size
        return rollout if is_whole else rollout.select(slice(first * n_envs, stop * n_envs))

    def _unevaluated(self) -> dict[str, Any]:
        obs_tensor = obs_as_tensor(self._observations, self._policy.device)
        return {"obs_tensor": obs_tensor, **self._adapter.more_variables(self._step)}
