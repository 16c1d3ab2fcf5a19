"""The updates that ``update.py`` times: ours, sb3-contrib's and Tianshou's, each repeatable on one rollout."""

import peers  # isort: skip  (first: one thread)

import copy
import gc
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import sb3_contrib.trpo.trpo as contrib_module
import torch as th
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

import sb3_trpo.trpo as our_module
from sb3_trpo.optim.batch import normalize_advantages
from sb3_trpo.rollouts.buffers import read_rollout
from sb3_trpo.saving.sb3_contrib import kl_dimensions
from sb3_trpo.zoo.tianshou_peer import tianshou_trpo

BUFFER_ARRAYS = ("observations", "actions", "rewards", "advantages", "returns", "episode_starts", "log_probs", "values")

Clock = Callable[[], float]


class Times(NamedTuple):
    """Seconds of one update."""

    actor: float
    critic: float


class Contender:
    """
    An update that can be repeated.

    :param model: an SB3 algorithm with a full rollout buffer
    :param clock: one of ``timing.CLOCKS``
    """

    def __init__(self, model: OnPolicyAlgorithm, clock: Clock) -> None:
        self.model = model
        self.clock = clock
        model.set_logger(Logger(None, []))
        self._buffer = {name: getattr(model.rollout_buffer, name).copy() for name in BUFFER_ARRAYS}
        self._start = copy.deepcopy(model.policy.state_dict())
        # Adam's state is there in every update but the first one.
        model.train()
        self._optimizer = copy.deepcopy(model.policy.optimizer.state_dict())
        self.restore()

    def restore(self) -> None:
        """Put everything back to before the update."""
        self.model.policy.load_state_dict(self._start)
        self.model.policy.optimizer.load_state_dict(copy.deepcopy(self._optimizer))
        buffer = self.model.rollout_buffer
        for name, array in self._buffer.items():
            setattr(buffer, name, array.copy())
        buffer.generator_ready, buffer.full, buffer.pos = False, True, buffer.buffer_size

    def time(self) -> Times:
        """Update, and say how long the two parts took."""
        self.restore()
        gc.collect()
        started = self.clock()
        turned = self._train()
        ended = self.clock()
        return Times(turned - started, ended - turned)

    def _train(self) -> float:
        """Update; return the moment at which the critic's turn came."""
        raise NotImplementedError

    def direction(self) -> tuple[th.Tensor, dict[str, Any]]:
        """The direction x that the update finds, in terms of the joint KL, and what else is to be told."""
        raise NotImplementedError


class Ours(Contender):
    def _train(self) -> float:
        turned: list[float] = []
        fit = type(self.model)._fit_critic

        def marked(*args: Any) -> Any:
            turned.append(self.clock())
            return fit(self.model, *args)

        with mock.patch.object(self.model, "_fit_critic", marked):
            self.model.train()
        return turned[0]

    def direction(self) -> tuple[th.Tensor, dict[str, Any]]:
        self.restore()
        solver, solutions = our_module.conjugate_gradient, []

        def solve(*args: Any, **kwargs: Any) -> Any:
            solutions.append(solver(*args, **kwargs))
            return solutions[-1]

        with mock.patch.object(our_module, "conjugate_gradient", solve):
            self.model.train()
        values = self.model.logger.name_to_value
        told = {
            "cg_iterations": solutions[0].iterations,
            "kl": float(values["train/kl_divergence_loss"]),
            "objective": float(values["train/policy_objective"]),
            "value_loss": float(values["train/value_loss"]),
        }
        return solutions[0].x, told


class Contrib(Contender):
    def _train(self) -> float:
        turned: list[float] = []
        get = self.model.rollout_buffer.get

        def marked(batch_size: int | None = None) -> Any:
            if batch_size is not None and not turned:
                turned.append(self.clock())
            return get(batch_size)

        with mock.patch.object(self.model.rollout_buffer, "get", marked):
            self.model.train()
        return turned[0]

    def direction(self) -> tuple[th.Tensor, dict[str, Any]]:
        self.restore()
        solver, products, found = contrib_module.conjugate_gradient_solver, [], []

        def solve(product: Callable[[th.Tensor], th.Tensor], b: th.Tensor, **kwargs: Any) -> th.Tensor:
            def counted(v: th.Tensor) -> th.Tensor:
                products.append(1)
                return product(v)

            found.append(solver(counted, b, **kwargs))
            return found[-1]

        with mock.patch.object(contrib_module, "conjugate_gradient_solver", solve):
            self.model.train()
        # Its Fisher matrix and damping are the joint ones over d, so its direction is d times ours.
        d = kl_dimensions(self.model.action_space)
        values = self.model.logger.name_to_value
        told = {
            "cg_iterations": len(products) - 1,
            "kl": float(values["train/kl_divergence_loss"]) * d,
            "objective": float(values["train/policy_objective"]),
            "value_loss_mean_over_epochs": float(values["train/value_loss"]),
        }
        return found[0] / d, told


class Tianshou:
    """
    Tianshou's update on the rollout of an SB3 algorithm.

    :param model: algorithm with a full rollout buffer and a policy of two equal networks
    :param clock: one of ``timing.CLOCKS``
    """

    def __init__(self, model: OnPolicyAlgorithm, clock: Clock) -> None:
        from tianshou.data import Batch

        self.clock = clock
        self.algorithm = tianshou_trpo(model.observation_space, model.action_space)
        peers.load_into_tianshou(model.policy, self.algorithm)
        rollout = normalize_advantages(read_rollout(model.rollout_buffer, model.action_space))
        observations = np.asarray(rollout.inputs)
        self._batch = Batch(
            obs=observations,
            act=rollout.actions,
            adv=rollout.advantages,
            returns=rollout.returns,
            info=np.array([{}] * len(observations)),
        )
        with th.no_grad():
            self._batch.logp_old = self.algorithm.policy(self._batch).dist.log_prob(self._batch.act)
        self._start = copy.deepcopy(self._state())
        self._update()
        self._start["optimizer"] = copy.deepcopy(self.algorithm.optim._optim.state_dict())
        self.restore()

    def _state(self) -> dict[str, Any]:
        return {"actor": self.algorithm.policy.state_dict(), "critic": self.algorithm.critic.state_dict()}

    def restore(self) -> None:
        self.algorithm.policy.load_state_dict(self._start["actor"])
        self.algorithm.critic.load_state_dict(self._start["critic"])
        self.algorithm.optim._optim.load_state_dict(copy.deepcopy(self._start["optimizer"]))

    def _update(self) -> None:
        self.algorithm._update_with_batch(self._batch, batch_size=None, repeat=1)

    def time(self) -> Times:
        self.restore()
        gc.collect()
        turned: list[float] = []

        def mark(*_: Any) -> None:
            if not turned:
                turned.append(self.clock())

        handle = self.algorithm.critic.register_forward_pre_hook(mark)
        started = self.clock()
        self._update()
        ended = self.clock()
        handle.remove()
        return Times(turned[0] - started, ended - turned[0])

    def direction(self) -> tuple[th.Tensor, dict[str, Any]]:
        self.restore()
        solve, found = self.algorithm._conjugate_gradients, []

        def remember(*args: Any, **kwargs: Any) -> th.Tensor:
            found.append(-solve(*args, **kwargs))  # it descends
            return -found[-1]

        with mock.patch.object(self.algorithm, "_conjugate_gradients", remember):
            self._update()
        return found[0], {"cg_iterations": 10}


def copy_rollout(source: OnPolicyAlgorithm, target: OnPolicyAlgorithm) -> None:
    for name in BUFFER_ARRAYS:
        setattr(target.rollout_buffer, name, getattr(source.rollout_buffer, name).copy())
    target.rollout_buffer.full, target.rollout_buffer.pos = True, target.rollout_buffer.buffer_size
