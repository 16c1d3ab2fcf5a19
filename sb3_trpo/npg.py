"""The natural policy gradient as a Stable-Baselines3 algorithm."""

import math
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule
from torch import nn

from sb3_trpo.arguments import POSITIVE_OR_SCHEDULE_OR_NONE, Rule, check_arguments
from sb3_trpo.optim.line_search import Evaluation, LineSearchResult, LineSearchStatus
from sb3_trpo.optim.objective import Surrogate
from sb3_trpo.optim.parameters import Snapshot, assign, flatten
from sb3_trpo.optim.statistics import PolicyStep
from sb3_trpo.trpo import TRPO, is_step

SelfNPG = TypeVar("SelfNPG", bound="NPG")


class NPG(TRPO):
    """
    Natural Policy Gradient (NPG): TRPO's direction, taken without a line search.

    Paper: Kakade 2001, https://papers.nips.cc/paper/2073-a-natural-policy-gradient. The step is either as long as the
    quadratic model of the KL allows (Rajeswaran et al. 2017, https://arxiv.org/abs/1703.02660, equation 7), or a fixed
    multiple of the direction, as in the paper. Nothing measures the KL of the step before it is taken: it may exceed
    ``target_kl``. A step to parameters where the objective or the KL is not finite is taken back.

    Takes the arguments of :class:`TRPO`, but for those of the line search, and one more.

    :param policy: as :class:`TRPO`
    :param env: as :class:`TRPO`
    :param learning_rate: as :class:`TRPO`
    :param n_steps: as :class:`TRPO`
    :param batch_size: as :class:`TRPO`
    :param gamma: as :class:`TRPO`
    :param cg_max_steps: as :class:`TRPO`
    :param cg_damping: as :class:`TRPO`
    :param n_critic_updates: as :class:`TRPO`
    :param gae_lambda: as :class:`TRPO`
    :param use_sde: as :class:`TRPO`
    :param sde_sample_freq: as :class:`TRPO`
    :param rollout_buffer_class: as :class:`TRPO`
    :param rollout_buffer_kwargs: as :class:`TRPO`
    :param normalize_advantage: as :class:`TRPO`
    :param target_kl: δ, the KL that the quadratic model expects of an update, in nats; number or schedule. Not used with
        ``actor_step_size``
    :param actor_step_size: what the direction (F + λI)⁻¹g is multiplied with; number or schedule. None for the length that
        ``target_kl`` gives
    :param sub_sampling_factor: as :class:`TRPO`
    :param stats_window_size: as :class:`TRPO`
    :param tensorboard_log: as :class:`TRPO`
    :param policy_kwargs: as :class:`TRPO`
    :param verbose: as :class:`TRPO`
    :param seed: as :class:`TRPO`
    :param device: as :class:`TRPO`
    :param _init_setup_model: as :class:`TRPO`
    :param kwargs: the other keyword arguments of :class:`TRPO`, from ``cg_residual_tol`` on
    :raises ValueError: an argument is out of range; the message names it, its value and what is allowed
    """

    argument_rules: ClassVar[dict[str, Rule]] = {**TRPO.argument_rules, "actor_step_size": POSITIVE_OR_SCHEDULE_OR_NONE}

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 2048,
        batch_size: int = 128,
        gamma: float = 0.99,
        cg_max_steps: int = 15,
        cg_damping: float = 0.1,
        n_critic_updates: int = 10,
        gae_lambda: float = 0.95,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        target_kl: float | Schedule = 0.05,
        actor_step_size: float | Schedule | None = None,
        sub_sampling_factor: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        check_arguments({"actor_step_size": self.argument_rules["actor_step_size"]}, locals())
        for name in kwargs:
            if name.startswith("line_search_"):
                raise TypeError(f"NPG has no line search: {name!r} is not one of its arguments")
        self.actor_step_size = actor_step_size
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            gamma=gamma,
            cg_max_steps=cg_max_steps,
            cg_damping=cg_damping,
            n_critic_updates=n_critic_updates,
            gae_lambda=gae_lambda,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            normalize_advantage=normalize_advantage,
            target_kl=target_kl,
            sub_sampling_factor=sub_sampling_factor,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
            **kwargs,
        )

    def _step_length(self, curvature: float, n_steps: int) -> float:
        if self.actor_step_size is None:
            return super()._step_length(curvature, n_steps)
        schedule = self.actor_step_size if callable(self.actor_step_size) else float(self.actor_step_size)
        return FloatSchedule(schedule)(self._current_progress_remaining)

    def _search(
        self, surrogate: Surrogate, actor: list[nn.Parameter], step: th.Tensor, start: Evaluation, expected: float
    ) -> LineSearchResult:
        """Take the step; take it back if it leads nowhere. See :meth:`TRPO._search`."""
        if not is_step(step):
            return LineSearchResult(LineSearchStatus.SKIPPED, 0.0, 0, start)
        before = Snapshot(actor)
        assign(actor, flatten(actor).detach() + step)
        point = surrogate.evaluate()
        if math.isfinite(point.objective) and math.isfinite(point.kl):
            return LineSearchResult(LineSearchStatus.ACCEPTED, 1.0, 0, point)
        before.restore()
        return LineSearchResult(LineSearchStatus.REJECTED, 0.0, 0, start)

    def _record_outcomes(self, steps: list[PolicyStep]) -> None:
        accepted = [step.search.outcome is LineSearchStatus.ACCEPTED for step in steps]
        self.logger.record("train/is_step_success", float(np.mean(accepted)))
        if self.actor_step_size is None:
            self.logger.record("train/target_kl", self._current_target_kl)

    def learn(
        self: SelfNPG,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "NPG",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfNPG:
        """
        Train.

        :param total_timesteps: as :class:`TRPO`
        :param callback: as :class:`TRPO`
        :param log_interval: as :class:`TRPO`
        :param tb_log_name: name of the run in TensorBoard
        :param reset_num_timesteps: as :class:`TRPO`
        :param progress_bar: as :class:`TRPO`
        :return: the model
        """
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
