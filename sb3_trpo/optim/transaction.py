"""An update either ends with finite parameters or leaves them as they were."""

import math
from types import TracebackType

from torch import nn

from sb3_trpo.errors import NonFiniteError
from sb3_trpo.optim.conjugate_gradient import CGStatus
from sb3_trpo.optim.critic import CriticFit
from sb3_trpo.optim.line_search import LineSearchStatus
from sb3_trpo.optim.parameters import Snapshot, all_finite
from sb3_trpo.optim.statistics import PolicyStep


class UpdateTransaction:
    """
    Context of one update: restores the policy if it raises or ends with a number that is not finite, and counts failures.

    :param policy: the policy before the update
    :param n_failed: consecutive failed updates before this one
    :param max_failed: how many in a row end the training
    """

    def __init__(self, policy: nn.Module, n_failed: int, max_failed: int) -> None:
        self.steps: list[PolicyStep] = []
        self.critic = CriticFit([math.nan], False)
        #: Consecutive failed updates, with this one if it failed; known after the context.
        self.n_failed = n_failed
        self._max_failed = max_failed
        self._tensors = [*policy.parameters(), *policy.buffers()]
        self._before = Snapshot(self._tensors)
        self._buffers = Snapshot(policy.buffers())
        self._failure = ""

    def __enter__(self) -> "UpdateTransaction":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._before.restore()
            return
        self._failure = self._find_failure()
        self.n_failed = self.n_failed + 1 if self._failure else 0

    def restore_buffers_without_step(self) -> None:
        """Restore the buffers, running statistics among them, if the policy has taken no step."""
        if all(step.search.outcome is not LineSearchStatus.ACCEPTED for step in self.steps):
            self._buffers.restore()

    def _find_failure(self) -> str:
        """Name what is not finite, and restore the policy if it is in there."""
        if not all_finite(self._tensors):
            self._before.restore()
            return "a parameter"
        if not all(math.isfinite(step.gradient_norm) for step in self.steps):
            return "the gradient"
        if any(_has_no_solution(step) for step in self.steps):
            return "the conjugate gradient method's result"
        return "" if self.critic.succeeded or math.isfinite(self.critic.value_loss) else "the critic's loss"

    def raise_if_stuck(self) -> None:
        """
        End a training whose updates keep failing.

        :raises NonFiniteError: too many updates in a row have failed
        """
        if self.n_failed >= self._max_failed:
            raise NonFiniteError(
                f"{self.n_failed} updates in a row were undone because a number was not finite, in the last one "
                f"{self._failure}; the parameters are unchanged. Look for very large rewards or observations"
            )


def _has_no_solution(step: PolicyStep) -> bool:
    is_refused = step.search.outcome is not LineSearchStatus.ACCEPTED
    return is_refused and (step.solution.status is CGStatus.NOT_FINITE or not all_finite([step.solution.x]))
