"""Saving, loading and resuming: nothing lost, nothing let in."""

import io
import json
import pathlib
import pickle
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
from sb3_trpo.errors import CorruptCheckpointError, MismatchError, Source, UntrustedFileError, WorkerError, short
from sb3_trpo.rollouts.checks import EnvOutputCheck, kept_statistics
from sb3_trpo.saving.archive import METADATA, Archive, print_versions, read_bytes
from sb3_trpo.saving.atomic import atomic_write
from sb3_trpo.saving.env_state import StateUnavailableError, capture_all, capture_wrappers, restore_all, restore_wrappers
from sb3_trpo.saving.model_file import (
    build_model,
    check_algorithm,
    check_keywords,
    check_parameters,
    check_spaces,
    check_values,
    read_model_file,
)
from sb3_trpo.saving.random_state import random_state, set_random_state, unchanged_random_state
from sb3_trpo.saving.signals import release_signals
from sb3_trpo.saving.unpickling import RefusedError, restricted_loads
from sb3_trpo.saving.vec_normalize import STATISTICS, Statistics, pack_statistics, read_statistics, warn_of_mismatch

RESUME = "sb3_trpo_resume.pkl"
#: Where the environments of a process are: attributes that a file has for one process alone.
PLACE = ("_last_obs", "_last_original_obs", "_last_episode_starts")
SelfSaved = TypeVar("SelfSaved", bound="SavedAlgorithm")


class SavedAlgorithm(OnPolicyAlgorithm):
    """An on-policy algorithm whose files are written whole, read without running code, and resumed exactly."""

    #: What the constructor allows, by argument.
    argument_rules: ClassVar[dict[str, Rule]] = {}
    #: Values that the next write of the log is to hold, from before the checkpoint that the model was resumed from.
    _pending_log: list[dict[str, Any]] | None = None
    #: Updates logged before that.
    _iterations_before: int = 0
    _iteration: int = 0

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
        Save all that :meth:`resume` needs to go on as if there had been no break. It is a model's file as well.

        To be called between two updates, as ``CheckpointCallback`` does.

        :param path: file, to which ``.zip`` is added if it has no ending
        :raises PicklingError: an attribute cannot be saved; names it
        :raises OSError: the file cannot be written
        """
        self._write(path, None, None, {RESUME: pickle.dumps(self._resume_states())})

    def _resume_states(self) -> list[dict[str, Any]]:
        """What to restore in each process that trains."""
        return [self._resume_state()]

    def _resume_state(self) -> dict[str, Any]:
        log = self._pending_log
        if log is None and hasattr(self, "_logger"):
            log = [dict(values) for values in self._logger_state()]
        state = {
            "random": random_state(),
            "action_space": self.action_space,  # with its generator, which loading a model seeds anew
            "place": {name: getattr(self, name) for name in PLACE},
            "iteration": self._iteration,
            "log": log,
            "envs": None,
        }
        if self.env is None:
            return {**state, "reason": "the model has no environment"}
        try:
            return {**state, "wrappers": capture_wrappers(self.env), "envs": capture_all(self.env)}
        except StateUnavailableError as error:
            return {**state, "reason": str(error)}

    def _logger_state(self) -> list[dict[str, Any]]:
        """Find what the next write of the log will hold: values, how many were averaged, and which outputs leave them out."""
        return [self.logger.name_to_value, self.logger.name_to_count, self.logger.name_to_excluded]

    def _write(
        self, path: Source, exclude: Iterable[str] | None, include: Iterable[str] | None, members: dict[str, bytes]
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
        about = {"algorithm": self.algorithm(), "vec_normalize": normalizer is not None}
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
        Go on from a checkpoint as if there had been no break.

        Restored are the parameters, the optimizer, schedules and their horizon, counters, episode statistics, values waiting
        to be logged, wrappers such as ``VecNormalize``, all random generators, and the environments' inner state. Continue
        with ``model.learn(model.remaining_timesteps, reset_num_timesteps=False)``.

        :param path: file of :meth:`save_checkpoint`
        :param env: environment made as the first one was, or its registered name
        :param device: device of the networks
        :param custom_objects: attribute name ↦ object to use instead of the saved one, for schedules that are functions
        :param trust: read a file with entries of any class, which may run code of the file's author
        :return: the model
        :raises CorruptCheckpointError: the file is damaged, or no checkpoint
        :raises UntrustedFileError: reading an entry may run code
        :raises MismatchError: the environment differs from the one of the checkpoint
        """
        contents = read_bytes(path)
        archive = Archive(contents, path)
        try:
            states: list[dict[str, Any]] = restricted_loads(archive.read(RESUME))
        except RefusedError as error:
            raise UntrustedFileError(path, RESUME, error.what) from error
        except CorruptCheckpointError:
            raise
        except Exception as error:
            raise CorruptCheckpointError(path, RESUME, error) from error
        venv = cls._wrap_env(maybe_make_env(env, 0))
        with warnings.catch_warnings():
            # The statistics are about to be restored.
            warnings.filterwarnings("ignore", message=".*VecNormalize")
            model = cls.load(io.BytesIO(contents), venv, device, custom_objects, force_reset=False, trust=trust)
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

    def _restore_own(self, states: list[dict[str, Any]], statistics: Statistics | None, trust: bool) -> None:
        """
        Restore the state of this process, one of those that train together.

        :param states: states of the processes that the checkpoint is from
        :param statistics: settings and statistics of their ``VecNormalize``
        :param trust: as for :meth:`resume`
        """
        (state,) = states
        self._restore(state, trust)

    def _restore_counters(self, state: dict[str, Any]) -> None:
        self._iterations_before = self._iteration = state["iteration"]
        self._pending_log = state["log"]

    def _restore(self, state: dict[str, Any], trust: bool) -> None:
        assert self.env is not None
        self._restore_counters(state)
        if state["action_space"] != self.action_space:
            raise MismatchError("the checkpoint has another action space than its own model")
        self.action_space = state["action_space"]
        vars(self).update({name: state["place"][name] for name in PLACE})
        if self._last_obs is None or len(self._last_episode_starts) != self.env.num_envs:  # type: ignore[arg-type]
            saved = "none" if self._last_obs is None else len(self._last_episode_starts)  # type: ignore[arg-type]
            raise MismatchError(f"env has {self.env.num_envs} environments, the checkpoint {saved}")
        if "wrappers" in state:
            restore_wrappers(self.env, state["wrappers"], trust)
        if state["envs"] is None:
            self._last_obs = None
            warnings.warn(
                f"the environments begin new episodes, for their state was not in reach: {state['reason']}", stacklevel=3
            )
        else:
            restore_all(self.env, state["envs"], trust)
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
        """See :meth:`OnPolicyAlgorithm.learn`; whatever ends it, signals are treated afterwards as before."""
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
        if reset_num_timesteps:
            self._iterations_before = 0
        elif self._pending_log is not None:
            for values, restored in zip(self._logger_state(), self._pending_log, strict=True):
                values.update(restored)
        self._pending_log = None
        return result

    def dump_logs(self, iteration: int = 0) -> None:
        """
        Write the log.

        :param iteration: number of the update since ``learn`` was called
        """
        self._iteration = self._iterations_before + iteration
        super().dump_logs(self._iteration)


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
