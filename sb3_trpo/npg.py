"""The natural policy gradient as a Stable-Baselines3 algorithm."""

from typing import Annotated, Any, ClassVar

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_trpo.arguments import POSITIVE_OR_SCHEDULE_OR_NONE, Rule, schedule_value
from sb3_trpo.constructors import checked, rules_of, takes_arguments_of
from sb3_trpo.optim.line_search import Evaluation, LineSearchResult, take_step
from sb3_trpo.optim.objective import Surrogate
from sb3_trpo.optim.statistics import PolicyStep
from sb3_trpo.reporting import share_accepted
from sb3_trpo.trpo import TRPO

LINE_SEARCH_ARGUMENTS = (
    "line_search_shrinking_factor",
    "line_search_max_iter",
    "line_search_accept_ratio",
    "max_state_kl",
)


class NPG(TRPO):
    """
    Natural Policy Gradient (NPG): TRPO's direction without a line search.

    Paper: Kakade 2001, https://papers.nips.cc/paper/2073-a-natural-policy-gradient. The step is as long as the quadratic
    model of the KL allows (Rajeswaran et al. 2017, https://arxiv.org/abs/1703.02660, equation 7), or a fixed multiple of the
    direction, as in the paper. The KL is not measured before the step is taken, so it may exceed ``target_kl``; a step to
    an objective or a KL that is not finite is undone. Takes the arguments of :class:`TRPO` except those of the line search;
    from ``batch_size`` on by keyword only.

    :param actor_step_size: factor of the direction (F + λI)⁻¹g; number or schedule. None for the length at which the
        quadratic model of the KL is ``target_kl``, which has no effect otherwise
    :raises ValueError: an argument is out of range; the message names it, its value and what is allowed
    """

    @takes_arguments_of(TRPO.__init__, without=LINE_SEARCH_ARGUMENTS)
    @checked
    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 2048,
        *,
        actor_step_size: Annotated[float | Schedule | None, POSITIVE_OR_SCHEDULE_OR_NONE] = None,
        **kwargs: Any,
    ) -> None:
        for name in kwargs.keys() & set(LINE_SEARCH_ARGUMENTS):
            raise TypeError(f"NPG has no line search: {name!r} is not one of its arguments")
        self.actor_step_size = actor_step_size
        super().__init__(policy, env, learning_rate, n_steps, **kwargs)

    _repr_attributes = ("actor_step_size", *TRPO._repr_attributes)
    argument_rules: ClassVar[dict[str, Rule]] = {**TRPO.argument_rules, **rules_of(__init__)}

    def _unused_arguments(self) -> dict[str, tuple[str, ...]]:
        unused = super()._unused_arguments()
        return unused if self.actor_step_size is None else {**unused, "actor_step_size": ("target_kl",)}

    def _step_size(self, curvature: float, n_steps: int) -> float:
        if self.actor_step_size is None:
            return super()._step_size(curvature, n_steps)
        return schedule_value("actor_step_size", self.actor_step_size, self._current_progress_remaining)

    def _line_search(self, surrogate: Surrogate, step: th.Tensor, start: Evaluation, expected: float) -> LineSearchResult:
        """Take the whole step. See :meth:`TRPO._line_search`."""
        return take_step(step, surrogate.model.parameters, surrogate.evaluate, start, buffers=self.policy.buffers())

    def _record_outcomes(self, steps: list[PolicyStep]) -> None:
        self.logger.record("train/is_step_success", share_accepted(steps))
        if self.actor_step_size is None:
            self.logger.record("train/target_kl", self._current_target_kl)
