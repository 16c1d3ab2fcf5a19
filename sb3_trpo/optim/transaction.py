"""An update either ends with finite parameters or leaves them as they were."""

import math
from collections.abc import Sequence

from torch import nn

from sb3_trpo.errors import NonFiniteError
from sb3_trpo.optim.conjugate_gradient import CGStatus
from sb3_trpo.optim.critic import CriticFit
from sb3_trpo.optim.line_search import LineSearchStatus
from sb3_trpo.optim.parameters import Snapshot, all_finite
from sb3_trpo.optim.statistics import PolicyStep


class UpdateTransaction:
    """
    Sees to it that an update leaves the policy finite, and counts those that came to a NaN or an infinity.

    :param policy: the policy before the update
    """

    def __init__(self, policy: nn.Module) -> None:
        self._tensors = [*policy.parameters(), *policy.buffers()]
        self._before = Snapshot(self._tensors)
        self._reason = ""

    def count(self, failed: int, steps: Sequence[PolicyStep], critic: CriticFit) -> int:
        """
        Look at what the update came to; put the policy back if a number in it is not finite.

        :param failed: updates in a row that failed before this one
        :param steps: steps of the policy
        :param critic: the regression
        :return: updates in a row that have failed, 0 if this one has not
        """
        if not all_finite(self._tensors):
            self._before.restore()
            self._reason = "a parameter"
        elif not all(math.isfinite(step.gradient_norm) for step in steps):
            self._reason = "the gradient"
        elif any(_is_without_result(step) for step in steps):
            self._reason = "the conjugate gradient method's result"
        elif not critic.succeeded and not math.isfinite(critic.value_loss):
            self._reason = "the critic's loss"
        else:
            return 0
        return failed + 1

    def stop_after(self, failed: int, most: int) -> None:
        """
        End a training that gets nowhere.

        :param failed: updates in a row that have failed
        :param most: so many are too many
        :raises NonFiniteError: that many have failed
        """
        if failed >= most:
            raise NonFiniteError(
                f"{failed} updates in a row were undone since a number was not finite, in the last one {self._reason}; "
                "the parameters are as before. Look for very large rewards or observations"
            )


def _is_without_result(step: PolicyStep) -> bool:
    refused = step.search.outcome is not LineSearchStatus.ACCEPTED
    return refused and (step.solution.status is CGStatus.NOT_FINITE or not all_finite([step.solution.x]))
