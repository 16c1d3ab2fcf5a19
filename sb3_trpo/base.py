"""Base class of all algorithms: safe files, exact resumption and distributed training."""

import functools
import io
import pathlib
import secrets
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.utils import update_learning_rate

from sb3_trpo.arguments import Rule, one_of, schedule_value, shown
from sb3_trpo.distributed import synchronization
from sb3_trpo.distributed.moments import merged
from sb3_trpo.distributed.process_group import SINGLE_PROCESS, ProcessGroup, RankInfo, detect_rank, join
from sb3_trpo.errors import did_you_mean
from sb3_trpo.rollouts.checks import EnvOutputCheck, kept_statistics
from sb3_trpo.rollouts.half_precision import widen_moments
from sb3_trpo.saving import checkpoint, loading
from sb3_trpo.saving.random_streams import CallbackStream, isolated
from sb3_trpo.saving.signals import release_signals
from sb3_trpo.threads import training_threads

#: Distance between the seeds of two processes: more than the environments of one, which have consecutive seeds.
SEED_STRIDE = 10_000

SelfResumable = TypeVar("SelfResumable", bound="ResumableAlgorithm")


class ResumableAlgorithm(OnPolicyAlgorithm):
    """
    An on-policy algorithm with safe files and exact resumption, which several processes can train together.

    The first process, rank 0, logs, evaluates and saves. In the others ``save`` writes nothing, the logger is silent, and
    only callbacks whose attribute ``on_every_rank`` is True are called.
    """

    #: What the constructor allows, by argument.
    argument_rules: ClassVar[dict[str, Rule]] = {}
    #: Train together with the other processes that ``torchrun`` started: True to require them, False to ignore them, None if
    #: there are any.
    distributed: bool | None = None
    #: Refuse observations with a NaN or an infinity.
    check_observations: bool = True
    #: Seconds that a process waits for the others before the training ends with an error.
    rank_timeout: float = 1800.0
    #: The latest rollout was stopped before its end, without an update.
    rollout_was_broken_off: bool = False
    _ranks: ProcessGroup = SINGLE_PROCESS
    #: The model was resumed and has not trained since; and the values for its next log.
    _resumed: bool = False
    _pending_log: list[dict[str, Any]] | None = None
    #: Rollouts since ``learn`` was called, including those before a resume.
    _iteration: int = 0
    _run_id: str = ""
    #: Names of the constructor arguments that the user gave.
    _given_arguments: frozenset[str] = frozenset()

    #: Attributes that ``repr`` shows after the policy, unless they are None.
    _repr_attributes: ClassVar[tuple[str, ...]] = ("target_kl", "num_timesteps")

    def __repr__(self) -> str:
        values = {name: getattr(self, name, None) for name in self._repr_attributes}
        words = [f"{name}={shown(value)}" for name, value in values.items() if value is not None]
        policy = getattr(self, "policy_class", None)
        return f"{type(self).__name__}({', '.join(words if policy is None else [policy.__name__, *words])})"

    @functools.cached_property
    def _callback_stream(self) -> CallbackStream:
        return CallbackStream()

    @property
    def _place(self) -> RankInfo:
        return detect_rank(one_of(True, False, None).check("distributed", self.distributed))

    @property
    def run_id(self) -> str:
        """Name of the training run, which checkpoints keep: a new one for each ``learn`` that starts counting at 0."""
        if not self._run_id:
            self._run_id = secrets.token_hex(8)
        return self._run_id

    @property
    def remaining_timesteps(self) -> int:
        """Environment steps from here to the horizon of the last call of ``learn``."""
        return max(self._total_timesteps - self.num_timesteps, 0)

    @classmethod
    def algorithm(cls) -> str:
        """
        Return the name of the algorithm: for a user's subclass, that of its base class in this package.

        :return: the name
        """
        return next(base.__name__ for base in cls.__mro__ if base.__module__.partition(".")[0] == "sb3_trpo")

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name not in self.policy_aliases:
            raise ValueError(
                f"policy={policy_name!r} is not allowed: it must be {' or '.join(map(repr, self.policy_aliases))}, or a "
                f"policy class{did_you_mean(policy_name, self.policy_aliases)}"
            )
        return self.policy_aliases[policy_name]

    # ---- files

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model, and the statistics of its ``VecNormalize``, in SB3's format.

        An existing file is replaced only when the new one is complete.

        :param path: file, or file object; ``.zip`` is added to a name without a suffix
        :param exclude: further attributes to leave out
        :param include: attributes to save that are left out by default
        :raises PicklingError: an attribute cannot be saved; names it
        :raises OSError: the file cannot be written
        """
        checkpoint.save_model(self, super().save, path, exclude, include)

    def save_checkpoint(self, path: str | pathlib.Path) -> None:
        """
        Save everything that :meth:`resume` needs to continue exactly. :meth:`load` reads the file as well.

        Call it between two updates, as ``CheckpointCallback`` does.

        :param path: path; ``.zip`` is added to a name without a suffix
        :raises PicklingError: an attribute cannot be saved; names it
        :raises OSError: the file cannot be written
        """
        checkpoint.save_checkpoint(self, super().save, path)

    @classmethod
    def load(
        cls: type[SelfResumable],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | str | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        *,
        trust: bool = False,
        allow_non_finite: bool = False,
        **kwargs: Any,
    ) -> SelfResumable:
        """
        Load a model that this class, or sb3-contrib's TRPO, has saved. The global random generators stay as they are.

        No code in the file is run: entries other than SB3's classes and plain data are refused. A model of sb3-contrib keeps
        its parameters and optimizer state. Its ``target_kl`` and ``cg_damping`` refer to a KL averaged over action dimensions;
        they are multiplied by the number of dimensions, with a warning.

        :param path: file, with or without ``.zip``, or file object
        :param env: environment to continue with, or its registered name; None to predict only
        :param device: device of the networks
        :param custom_objects: attribute name ↦ object to use instead of the saved one
        :param print_system_info: print the versions that saved the file, and the present ones
        :param force_reset: reset the environment before training continues
        :param trust: allow entries of any class, which may run code of the file's author, and use its
            ``tensorboard_log``
        :param allow_non_finite: load parameters with a NaN or an infinity
        :param kwargs: attributes to change, by name
        :return: the model
        :raises UntrustedFileError: reading an entry may run code; names the entry
        :raises CorruptCheckpointError: the file is damaged; names the damaged member
        :raises NonFiniteError: a parameter is not finite
        :raises TypeError: there is no attribute of a name in ``kwargs``
        :raises MismatchError: the environment has other spaces than the model
        :raises ValueError: the file holds a model of another algorithm
        """
        return loading.load_model(
            cls,
            path,
            env,
            device,
            dict(custom_objects or {}),
            kwargs,
            print_system_info=print_system_info,
            force_reset=force_reset,
            trust=trust,
            allow_non_finite=allow_non_finite,
        )

    def _loaded(self, names: set[str], keep: set[str]) -> None:
        """
        Adapt a model that was just loaded.

        :param names: names of the attributes in the file
        :param keep: names of the attributes that the user gave
        """

    @classmethod
    def resume(
        cls: type[SelfResumable],
        path: str | pathlib.Path,
        env: GymEnv | str,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        *,
        trust: bool = False,
    ) -> SelfResumable:
        """
        Continue exactly from a checkpoint.

        This restores the parameters, the optimizer, schedules and their horizon, counters, episode statistics, pending log
        values, wrappers such as ``VecNormalize``, all random generators, and the environments' inner state. Continue with
        ``model.learn(model.remaining_timesteps, reset_num_timesteps=False)``.

        :param path: file of :meth:`save_checkpoint`
        :param env: environment made like the first one, or its registered name
        :param device: device of the networks
        :param custom_objects: attribute name ↦ object to use instead of the saved one, for schedules that are functions
        :param trust: allow entries of any class, which may run code of the file's author
        :return: the model
        :raises CorruptCheckpointError: the file is damaged; names the damaged member
        :raises UsageError: the file is a model, not a checkpoint
        :raises UntrustedFileError: reading an entry may run code
        :raises MismatchError: the environment differs from the one of the checkpoint
        """
        return checkpoint.resume_model(cls, path, env, device, custom_objects, trust)

    def get_extra_state(self) -> dict[str, Any]:
        """
        Return what :meth:`resume` restores in addition to a saved model; for subclasses to extend.

        :return: plain data and NumPy arrays, by name
        """
        return checkpoint.capture_state(self)

    def set_extra_state(self, state: dict[str, Any], trust: bool) -> None:
        """
        Restore what :meth:`get_extra_state` returned; for subclasses to extend.

        :param state: the state
        :param trust: as for :meth:`resume`
        :raises MismatchError: the environment differs from the one of the checkpoint
        """
        checkpoint.restore_state(self, state, trust)

    def _excluded_save_params(self) -> list[str]:
        state = ("_resumed", "_pending_log", "_iteration", "_run_id", "rollout_was_broken_off")
        return [*super()._excluded_save_params(), *state, "_callback_stream", "_ranks", "_given_arguments"]

    # ---- acting

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """See :meth:`BaseAlgorithm.predict`; with the number of torch threads that ``learn`` uses."""
        with training_threads(self.policy):
            return super().predict(observation, state, episode_start, deterministic)

    # ---- training

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed all generators, differently in each process.

        :param seed: the seed; process number r takes ``seed + 10_000 r``. None for none
        """
        rank = self._place.rank
        if seed is None and rank > 0:
            th.seed()  # torch begins with the same seed in every process
        super().set_random_seed(None if seed is None else seed + SEED_STRIDE * rank)

    def learn(
        self: SelfResumable,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfResumable:
        """
        Train. Signal handlers and torch's number of threads are restored at the end.

        :param total_timesteps: environment steps to collect, over all environments; rollouts are always completed
        :param callback: SB3 callback, or a list of them
        :param log_interval: updates between two writes of the log
        :param tb_log_name: name of the run in TensorBoard; None for the name of the algorithm
        :param reset_num_timesteps: start counting at 0; False to continue an earlier call
        :param progress_bar: show a progress bar (tqdm and rich)
        :return: the model
        """
        name = self.algorithm() if tb_log_name is None else tb_log_name
        try:
            with training_threads(self.policy) as threads:
                if self.verbose >= 1:
                    print(threads)
                return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)
        finally:
            release_signals()

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        self._ranks = join(self._place, self.n_envs, self.device, self.rank_timeout)
        if self._ranks.size > 1:
            synchronization.check_agreement(self, total_timesteps)
            synchronization.take_from_first(self)
        if self._ranks.rank > 0:
            callback, progress_bar = synchronization.kept_callbacks(callback), False
            self.set_logger(Logger(folder=None, output_formats=[]))
        if self.env is not None:
            widen_moments(self.env)
        with merged(synchronization.running_moments_of(self.env), self._ranks), kept_statistics(self.env):
            result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
            if self.env is not None:
                EnvOutputCheck(self.env, self.num_timesteps, self.check_observations).check_start(self._last_obs)
        self._start_counting(reset_num_timesteps)
        return result

    def _start_counting(self, reset_num_timesteps: bool) -> None:
        """Count rollouts from 0 in each call of ``learn``, as SB3 does, except in the first one after a resume."""
        if reset_num_timesteps or not self._resumed:
            self._iteration = 0
        elif self._pending_log is not None:
            for values, restored in zip(checkpoint.logger_state(self), self._pending_log, strict=True):
                values.update(restored)
        if reset_num_timesteps:
            self._run_id = ""
        self._resumed, self._pending_log = False, None

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        learning_rate = schedule_value("learning_rate", self.learning_rate, self._current_progress_remaining)
        self.logger.record("train/learning_rate", learning_rate)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            update_learning_rate(optimizer, learning_rate)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may go beyond the total, and a schedule that ends at 0 must not go below it.
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if not self._resumed:
            self._callback_stream.reset()
        with self._callback_stream.active(everything=True):
            initialized = super()._init_callback(callback, progress_bar)
        return isolated(initialized, self._callback_stream)

    def dump_logs(self, iteration: int = 0) -> None:
        """
        Write the log.

        :param iteration: number of the rollout since ``learn`` was called; 0 to leave it out
        """
        super().dump_logs(self._iteration if iteration > 0 else 0)

    def sync_signal(self, number: int | None) -> int | None:
        """
        Return a signal to stop, if any process has received one.

        :param number: the signal that this process received, or None
        :return: one of the received signals, or None
        """
        return int(self._ranks.max(th.tensor(number or 0))) or None
