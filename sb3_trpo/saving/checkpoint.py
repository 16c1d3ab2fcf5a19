"""Saving, safe loading and exact resumption."""

import functools
import io
import json
import pathlib
import pickle
import secrets
import time
import warnings
import zipfile
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.save_util import data_to_json
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback

from sb3_trpo.arguments import Rule
from sb3_trpo.errors import (
    CorruptCheckpointError,
    MismatchError,
    NamedBytes,
    Source,
    UntrustedFileError,
    UsageError,
    WorkerError,
    name_of,
    short,
)
from sb3_trpo.rollouts.checks import EnvOutputCheck, kept_statistics
from sb3_trpo.saving.archive import METADATA, Archive, print_versions, read_bytes
from sb3_trpo.saving.atomic import atomic_write
from sb3_trpo.saving.env_state import StateUnavailableError
from sb3_trpo.saving.layout import strides_of, with_strides
from sb3_trpo.saving.model_file import (
    build_model,
    check_algorithm,
    check_keywords,
    check_parameters,
    check_spaces,
    check_values,
    read_model_file,
)
from sb3_trpo.saving.random_state import set_random_state, unchanged_random_state
from sb3_trpo.saving.random_streams import CallbackStream, isolated
from sb3_trpo.saving.signals import release_signals
from sb3_trpo.saving.unpickling import RefusedError, restricted_loads
from sb3_trpo.saving.vec_env_state import capture_all, capture_wrappers, restore_all, restore_wrappers
from sb3_trpo.saving.vec_normalize import (
    STATISTICS,
    Statistics,
    pack_statistics,
    read_statistics,
    set_statistics,
    warn_of_mismatch,
)

RESUME = "sb3_trpo_resume.pkl"
#: Attributes that each process has of its own: the present step of its environments.
PER_RANK_ATTRIBUTES = ("_last_obs", "_last_original_obs", "_last_episode_starts")
SelfSaved = TypeVar("SelfSaved", bound="SavedAlgorithm")


class SavedAlgorithm(OnPolicyAlgorithm):
    """An on-policy algorithm whose files are written whole, read without running code, and resumed exactly."""

    #: What the constructor allows, by argument.
    argument_rules: ClassVar[dict[str, Rule]] = {}
    #: Whether the model was resumed and has not trained since; then what the next write of the log is to hold.
    _resumed: bool = False
    _pending_log: list[dict[str, Any]] | None = None
    #: Rollouts since ``learn`` was called, including those before a resume.
    _iteration: int = 0
    _run_id: str = ""

    @functools.cached_property
    def _callback_stream(self) -> CallbackStream:
        return CallbackStream()

    @property
    def run_id(self) -> str:
        """Name of the training run, which checkpoints keep: a new one for each ``learn`` that starts counting at 0."""
        if not self._run_id:
            self._run_id = secrets.token_hex(8)
        return self._run_id

    @classmethod
    def algorithm(cls) -> str:
        """
        Name of the algorithm: that of the class in this package that a user's own may be derived from.

        :return: the name
        """
        return next(base.__name__ for base in cls.__mro__ if base.__module__.partition(".")[0] == "sb3_trpo")

    # ---- saving

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model, and the statistics of its ``VecNormalize``, in SB3's format.

        An older file of that name is there until the new one is complete, and stays if anything goes wrong.

        :param path: file, to which ``.zip`` is added if it has no ending, or file object
        :param exclude: further attributes to leave out
        :param include: attributes to save although they usually are not
        :raises PicklingError: an attribute cannot be saved; names it
        :raises OSError: the file cannot be written
        """
        self._write(path, exclude, include, {})

    def save_checkpoint(self, path: str | pathlib.Path) -> None:
        """
        Save all that :meth:`resume` needs to continue as if there had been no interruption. :meth:`load` reads it as well.

        Call it between two updates, as ``CheckpointCallback`` does.

        :param path: file, to which ``.zip`` is added if it has no ending
        :raises PicklingError: an attribute cannot be saved; names it
        :raises OSError: the file cannot be written
        """
        about = {"run": self.run_id, "written": time.time_ns()}
        self._write(path, None, None, {RESUME: pickle.dumps(self._extra_states())}, about)

    def _extra_states(self) -> list[dict[str, Any]]:
        """Return the state of each process that trains."""
        return [self.get_extra_state()]

    def get_extra_state(self) -> dict[str, Any]:
        """
        Return what :meth:`resume` restores beside what a saved model holds; for subclasses to extend.

        :return: plain data and NumPy arrays, by name
        """
        log = self._pending_log if self._resumed else None
        if log is None and hasattr(self, "_logger"):
            log = [dict(values) for values in self._logger_state()]
        random, callbacks_random = self._callback_stream.states()
        place = {name: getattr(self, name) for name in PER_RANK_ATTRIBUTES}
        return {
            "random": random,
            "callbacks_random": callbacks_random,
            "action_space": self.action_space,  # with its generator, which loading a model seeds anew
            "place": place,
            "strides": {name: strides_of(value) for name, value in place.items()},
            "iteration": self._iteration,
            "run": self.run_id,
            "log": log,
            **self._environment_state(),
        }

    def _environment_state(self) -> dict[str, Any]:
        if self.env is None:
            return {"wrappers": {}, "envs": None, "reason": "the model has no environment"}
        wrappers = capture_wrappers(self.env)
        lost = [name for name, state in wrappers.items() if state is None]
        if lost:
            return {"wrappers": wrappers, "envs": None, "reason": f"the wrapper {lost[0]} cannot be pickled"}
        try:
            return {"wrappers": wrappers, "envs": capture_all(self.env)}
        except StateUnavailableError as error:
            return {"wrappers": wrappers, "envs": None, "reason": str(error)}

    def _logger_state(self) -> list[dict[str, Any]]:
        """Return what the next write of the log will hold: values, how many are averaged, and which outputs exclude them."""
        return [self.logger.name_to_value, self.logger.name_to_count, self.logger.name_to_excluded]

    def _write(
        self,
        path: Source,
        exclude: Iterable[str] | None,
        include: Iterable[str] | None,
        members: dict[str, bytes],
        about: dict[str, Any] | None = None,
    ) -> None:
        exclude, include = set(exclude or ()), set(include or ())
        buffer = io.BytesIO()
        try:
            super().save(buffer, exclude, include)
        except Exception as error:
            for name, value in vars(self).items():
                if name not in (exclude | set(self._excluded_save_params())) - include:
                    _check_picklable(name, value)
            raise error
        normalizer = self.get_vec_normalize_env()
        about = {"algorithm": self.algorithm(), "vec_normalize": normalizer is not None, **(about or {})}
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(METADATA, json.dumps(about))
            if normalizer is not None:
                archive.writestr(STATISTICS, pack_statistics(normalizer))
            for name, contents in members.items():
                archive.writestr(name, contents)
        if not isinstance(path, (str, pathlib.Path)):
            path.write(buffer.getvalue())
            return
        with atomic_write(_destination(pathlib.Path(path))) as file:
            file.write(buffer.getvalue())

    # ---- loading

    @classmethod
    def load(
        cls: type[SelfSaved],
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
    ) -> SelfSaved:
        """
        Load a model that this class, or sb3-contrib's TRPO, has saved. The global random generators stay as they are.

        Nothing in the file is run: an entry that asks for more than SB3's own classes and plain data is refused. A model of
        sb3-contrib keeps its parameters and optimizer state. Its ``target_kl`` and ``cg_damping`` refer to a KL averaged over
        action dimensions; they are multiplied by the number of dimensions, with a warning that says so.

        :param path: file, with or without ``.zip``, or file object
        :param env: environment to go on with, or its registered name; None if predictions are all that is needed
        :param device: device of the networks
        :param custom_objects: attribute name ↦ object to use instead of the saved one
        :param print_system_info: print the versions that saved the file, and the present ones
        :param force_reset: reset the environment before training goes on
        :param trust: read a file with entries of any class, which may run code of the file's author, and use its
            ``tensorboard_log``
        :param allow_non_finite: load parameters that hold a NaN or an infinity
        :param kwargs: attributes to change, by name
        :return: the model
        :raises UntrustedFileError: reading an entry may run code; names the entry, and what it asks for
        :raises CorruptCheckpointError: the file is damaged; names the damaged member
        :raises NonFiniteError: a parameter is not finite
        :raises TypeError: there is no attribute of a name in ``kwargs``
        :raises MismatchError: the environment has other spaces than the model
        :raises ValueError: the file holds a model of another algorithm
        """
        replaced = dict(custom_objects or {})
        archive = Archive(read_bytes(path), path)
        file = read_model_file(archive, path, cls.__name__, replaced, kwargs, trust)
        check_algorithm(file, cls.algorithm())
        check_keywords(cls, kwargs, file.names)
        check_values(file, cls.argument_rules)
        if not allow_non_finite:
            check_parameters(file)
        if print_system_info:
            print_versions(archive)
        if env is not None:
            env = cls._wrap_env(maybe_make_env(env, 0))
            check_spaces(env, file.values)
        with unchanged_random_state():
            try:
                model = build_model(cls, file, env, device, force_reset, kwargs)
            except (CorruptCheckpointError, UntrustedFileError):
                raise
            except Exception as error:
                if trust or kwargs or replaced:
                    raise
                what = f"it does not make a model ({type(error).__name__}: {short(error)})"
                raise CorruptCheckpointError(path, "data", what) from error
        model._loaded(file.names, keep=file.given)
        if file.about:
            statistics = read_statistics(archive, path)
            warn_of_mismatch(statistics and statistics[1], env, model.get_vec_normalize_env())
        return model

    def _loaded(self, names: set[str], keep: set[str]) -> None:
        """
        Change what has to be changed in a model that was just loaded.

        :param names: names of the attributes in the file
        :param keep: names of those that the user has given
        """

    # ---- resuming

    @classmethod
    def resume(
        cls: type[SelfSaved],
        path: str | pathlib.Path,
        env: GymEnv | str,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        *,
        trust: bool = False,
    ) -> SelfSaved:
        """
        Continue from a checkpoint as if there had been no interruption.

        This restores the parameters, the optimizer, schedules and their horizon, counters, episode statistics, pending log
        values, wrappers such as ``VecNormalize``, all random generators, and the environments' inner state. Continue with
        ``model.learn(model.remaining_timesteps, reset_num_timesteps=False)``.

        :param path: file of :meth:`save_checkpoint`
        :param env: environment made as the first one was, or its registered name
        :param device: device of the networks
        :param custom_objects: attribute name ↦ object to use instead of the saved one, for schedules that are functions
        :param trust: read a file with entries of any class, which may run code of the file's author
        :return: the model
        :raises CorruptCheckpointError: the file is damaged; names the damaged member
        :raises UsageError: the file is a model, and no checkpoint
        :raises UntrustedFileError: reading an entry may run code
        :raises MismatchError: the environment differs from the one of the checkpoint
        """
        archive = Archive(read_bytes(path), path)
        states = cls._read_extra_states(archive, path)
        venv = cls._wrap_env(maybe_make_env(env, 0))
        with warnings.catch_warnings():
            # The statistics are about to be restored.
            warnings.filterwarnings("ignore", message=".*VecNormalize")
            contents = NamedBytes(archive.contents, path)
            model = cls.load(contents, venv, device, custom_objects, force_reset=False, trust=trust)
        venv.reset()
        try:
            model._restore_own(states, read_statistics(archive, path), trust)
        except (MismatchError, WorkerError):
            raise
        except RefusedError as error:
            remedy = "trust=True resumes from a file of your own."
            raise UntrustedFileError(path, f"{RESUME} (environments)", error.what, remedy) from error
        except Exception as error:
            raise CorruptCheckpointError(path, RESUME, f"its state does not fit ({error!r})") from error
        return model

    @classmethod
    def _read_extra_states(cls, archive: Archive, path: Source) -> list[dict[str, Any]]:
        if RESUME not in archive.names and "data" in archive.names:
            raise UsageError(
                f"{name_of(path)} is a model without the state of its training, as save() writes it. To continue it from new "
                f"episodes, call {cls.__name__}.load({name_of(path)!r}, env=env).learn(steps, reset_num_timesteps=False). "
                "Only files of save_checkpoint() and CheckpointCallback can be resumed"
            )
        try:
            states: list[dict[str, Any]] = restricted_loads(archive.read(RESUME))
        except RefusedError as error:
            raise UntrustedFileError(path, RESUME, error.what) from error
        except CorruptCheckpointError:
            raise
        except Exception as error:
            raise CorruptCheckpointError(path, RESUME, error) from error
        return states

    def _restore_own(self, states: list[dict[str, Any]], statistics: Statistics | None, trust: bool) -> None:
        """
        Restore the state of this process, one of those that train together.

        :param states: states of the processes that wrote the checkpoint
        :param statistics: settings and statistics of their ``VecNormalize``
        :param trust: as for :meth:`resume`
        """
        (state,) = states
        self._check_normalizer(statistics)
        self._restore_statistics(statistics)
        self.set_extra_state(state, trust)

    def _check_normalizer(self, statistics: Statistics | None) -> None:
        if (self.get_vec_normalize_env() is None) != (statistics is None):
            raise MismatchError("the wrappers differ: either env or the checkpoint has VecNormalize, and the other does not")

    def _restore_statistics(self, statistics: Statistics | None) -> None:
        normalizer = self.get_vec_normalize_env()
        if normalizer is not None and statistics is not None:
            set_statistics(normalizer, statistics[1])

    def _restore_counters(self, state: dict[str, Any]) -> None:
        self._resumed, self._iteration, self._pending_log = True, state["iteration"], state["log"]
        self._run_id = state.get("run", "")

    def set_extra_state(self, state: dict[str, Any], trust: bool) -> None:
        """
        Restore what :meth:`get_extra_state` returned; for subclasses to extend.

        :param state: the state
        :param trust: as for :meth:`resume`
        :raises MismatchError: the environment differs from the one of the checkpoint
        """
        assert self.env is not None
        self._restore_counters(state)
        if state["action_space"] != self.action_space:
            raise MismatchError("the checkpoint has another action space than its own model")
        self.action_space = state["action_space"]
        for name in PER_RANK_ATTRIBUTES:
            setattr(self, name, with_strides(state["place"][name], state.get("strides", {}).get(name)))
        if self._last_obs is None or len(self._last_episode_starts) != self.env.num_envs:  # type: ignore[arg-type]
            saved = "none" if self._last_obs is None else len(self._last_episode_starts)  # type: ignore[arg-type]
            raise MismatchError(f"env has {self.env.num_envs} environments, the checkpoint {saved}")
        if "wrappers" in state:
            restore_wrappers(self.env, state["wrappers"], trust)
        if state["envs"] is None:
            self._last_obs = None
            warnings.warn(
                f"the environments start new episodes, because their state could not be captured: {state['reason']}",
                stacklevel=4,
            )
        else:
            restore_all(self.env, state["envs"], trust)
        self._callback_stream.reset(state.get("callbacks_random"))
        set_random_state(state["random"])

    @property
    def remaining_timesteps(self) -> int:
        """Environment steps from here to the horizon of the last call of ``learn``."""
        return max(self._total_timesteps - self.num_timesteps, 0)

    def learn(
        self: SelfSaved,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "OnPolicyAlgorithm",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfSaved:
        """See :meth:`OnPolicyAlgorithm.learn`; signal handlers are restored, however it ends."""
        try:
            return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
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
        with kept_statistics(self.env):
            result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
            if self.env is not None:
                EnvOutputCheck(self.env, self.num_timesteps).check_start(self._last_obs)
        self._start_counting(reset_num_timesteps)
        return result

    def _start_counting(self, reset_num_timesteps: bool) -> None:
        """Count rollouts from 0, as SB3 does in each call of ``learn``, unless this call continues one of before a resume."""
        if reset_num_timesteps or not self._resumed:
            self._iteration = 0
        elif self._pending_log is not None:
            for values, restored in zip(self._logger_state(), self._pending_log, strict=True):
                values.update(restored)
        if reset_num_timesteps:
            self._run_id = ""
        self._resumed, self._pending_log = False, None

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

    def _excluded_save_params(self) -> list[str]:
        own = ("_resumed", "_pending_log", "_iteration", "_run_id", "_callback_stream")
        return [*super()._excluded_save_params(), *own]


def read_run(path: pathlib.Path) -> tuple[str, int]:
    """
    Find out which run a checkpoint is of, and when it was written.

    :param path: the file
    :return: :attr:`SavedAlgorithm.run_id`, empty if it is not known, and nanoseconds since 1970
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(METADATA) as member:
            about = json.loads(member.read(2**16))
        return str(about["run"]), int(about["written"])
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):  # damaged, or of an earlier version
        return "", path.stat().st_mtime_ns


def _check_picklable(name: str, value: Any) -> None:
    try:
        data_to_json({name: value})
    except Exception as error:
        raise pickle.PicklingError(f"attribute {name!r} cannot be saved: {error}; exclude=[{name!r}] leaves it out") from error


def _destination(path: pathlib.Path) -> pathlib.Path:
    """Where SB3 puts a file that is to be saved as ``path``."""
    if path.suffix == "":
        path = path.with_name(f"{path.name}.zip")
    if path.is_dir():
        warnings.warn(f"{path} is a folder: saved as {path}_2 instead", stacklevel=5)
        path = path.with_name(f"{path.name}_2")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
