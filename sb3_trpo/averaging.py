"""Average the policy over the updates."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch as th
from stable_baselines3.common.callbacks import EvalCallback, EventCallback

from sb3_trpo.arguments import OPEN_UNIT_INTERVAL, check_arguments, instance_of, optional
from sb3_trpo.base import ResumableAlgorithm
from sb3_trpo.optim.parameters import Snapshot


class PolicyAverage(EventCallback):
    """
    Keep an average of the policy over the updates, θ̄ ← d θ̄ + (1 − d) θ. It is the model's policy when training ends.

    An update uses its whole trust region, even where the policy is good and the gradient is mostly noise. So policies vary
    from update to update; their average does not (Polyak & Juditsky 1992; for policies: Nikishin et al. 2018, "Improving
    Stability in Deep Reinforcement Learning with Weight Averaging"). Rollouts and trust region are those of the newest policy.

    Each call of ``learn`` starts a new average. A checkpoint has the newest policy, and no average.

    :param decay: d, in (0, 1); the average is over about 1 / (1 − d) updates
    :param evaluation: evaluates the average instead of the newest policy, and saves it where it is the best so far; None for
        no evaluation
    :raises ValueError: an argument is not allowed
    """

    model: ResumableAlgorithm
    callback: EvalCallback | None  # the evaluation
    on_every_rank = True  # all have the same average

    def __init__(self, decay: float = 0.9, evaluation: EvalCallback | None = None) -> None:
        evaluations = optional(instance_of(EvalCallback, allowed="an EvalCallback"))
        check_arguments({"decay": OPEN_UNIT_INTERVAL, "evaluation": evaluations}, locals())
        super().__init__(evaluation)
        self.decay = decay
        self.draws_random_numbers = evaluation is not None
        self._average: list[th.Tensor] = []
        self._n_averaged = 0

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._average, self._n_averaged = [tensor.detach().clone() for tensor in self._tensors()], 0

    def _on_rollout_start(self) -> None:
        self._follow()

    def _on_step(self) -> bool:
        if self.callback is None or self.model._ranks.rank > 0:
            return True
        if self.callback.eval_freq > 0 and (self.callback.n_calls + 1) % self.callback.eval_freq == 0:
            with self.in_place():
                return self._on_event()
        return self._on_event()

    def _on_training_end(self) -> None:
        if not self.model.rollout_was_broken_off:
            self._follow()
        self._assign_average()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """
        Make the average the model's policy while the context lasts.

        :return: context manager
        """
        newest = Snapshot(self._tensors())
        self._assign_average()
        try:
            yield
        finally:
            newest.restore()

    @th.no_grad()
    def _follow(self) -> None:
        """Move the average toward the newest policy. The first ones count alike."""
        self._n_averaged += 1
        weight = max(1.0 - self.decay, 1.0 / self._n_averaged)
        for average, newest in zip(self._average, self._tensors(), strict=True):
            average.lerp_(newest, weight)

    @th.no_grad()
    def _assign_average(self) -> None:
        for tensor, average in zip(self._tensors(), self._average, strict=True):
            tensor.copy_(average)

    def _tensors(self) -> list[th.Tensor]:
        policy = self.model.policy
        return [*policy.parameters(), *(buffer for buffer in policy.buffers() if buffer.is_floating_point())]
