"""An on-policy algorithm of which several processes take one common step, each with environments of its own."""

import functools
import hashlib
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_trpo.arguments import one_of
from sb3_trpo.distributed.moments import merged
from sb3_trpo.distributed.process_group import SINGLE_PROCESS, ProcessGroup, RankInfo, detect_rank, join
from sb3_trpo.errors import RankError, Source
from sb3_trpo.saving.checkpoint import SavedAlgorithm
from sb3_trpo.saving.vec_normalize import Statistics, running_moments

#: Distance between the seeds of two processes: more than the environments of one, which have consecutive seeds.
SEED_STRIDE = 10_000
EPISODE_BUFFERS = ("ep_info_buffer", "ep_success_buffer")

Collect = TypeVar("Collect", bound=Callable[..., bool])


class Report(NamedTuple):
    """
    What a process tells the others at the end of its rollout.

    :param goes_on: False if a callback of its own has stopped the training
    :param steps: environment steps that it has taken
    :param episodes: statistics of the episodes that have ended, by the name of SB3's buffer
    :param fingerprints: hashes of what is to be the same in all processes
    """

    goes_on: bool
    steps: int
    episodes: dict[str, list[Any]]
    fingerprints: dict[str, str]


class DistributedAlgorithm(SavedAlgorithm):
    """
    An on-policy algorithm that several processes train together.

    The first process, rank 0, logs, evaluates and saves. In the others ``save`` writes nothing, the logger is silent, and
    callbacks are left out but for those whose attribute ``on_every_rank`` is True.
    """

    #: Whether to train together with the other processes that ``torchrun`` started: True if there must be some, False for
    #: none, None for those there are.
    distributed: bool | None = None
    #: Seconds that a process waits for the others before the training ends with an error.
    rank_timeout: float = 1800.0
    #: Whether the latest rollout was stopped before its end, and no update followed.
    rollout_was_broken_off: bool = False
    _ranks: ProcessGroup = SINGLE_PROCESS

    @property
    def _place(self) -> RankInfo:
        return detect_rank(one_of(True, False, None).check("distributed", self.distributed))

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed all generators, in each process in another way.

        :param seed: the seed; process number r takes ``seed + 10_000 r``. None for none
        """
        rank = self._place.rank
        if seed is None and rank > 0:
            th.seed()  # torch begins with the same seed in every process
        super().set_random_seed(None if seed is None else seed + SEED_STRIDE * rank)

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
            self._check_agreement(total_timesteps)
            self._take_from_first()
        if self._ranks.rank > 0:
            callback, progress_bar = kept_callbacks(callback), False
            self.set_logger(Logger(folder=None, output_formats=[]))
        with merged(_running_moments(self.env), self._ranks):
            return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)

    def _take_from_first(self) -> None:
        """Begin with the parameters and the running statistics of the first process."""
        self._ranks.broadcast([*self.policy.parameters(), *self.policy.buffers()])
        running = [*_running_moments(self.env), *_running_moments(self)]
        first = self._ranks.gather_objects([vars(rms) for rms in running])[0]
        for rms, values in zip(running, first, strict=True):
            vars(rms).update(values)

    def _check_agreement(self, total_timesteps: int) -> None:
        """Raise an error if something that has to be the same in all processes is not."""
        named = {name: getattr(self, name) for name in self.argument_rules}
        arguments = {name: "a schedule" if callable(value) else value for name, value in named.items()}
        shapes = [tuple(tensor.shape) for tensor in self.policy.state_dict().values()]
        own = {"algorithm": self.algorithm(), **arguments, "total_timesteps": total_timesteps, "shapes of the policy": shapes}
        first, *others = self._ranks.gather_objects(own)
        for rank, theirs in enumerate(others, start=1):
            for name, value in theirs.items():
                if name not in first or first[name] != value:
                    raise ValueError(f"{name}={value!r} of rank {rank} is not allowed: rank 0 has {first.get(name)!r}")

    def sync_signal(self, number: int | None) -> int | None:
        """
        A signal to stop, if any process has received one.

        :param number: the signal that this process has received, if any
        :return: one of those received
        """
        return int(self._ranks.max(th.tensor(number or 0))) or None

    def _fingerprints(self) -> dict[str, str]:
        moments = [*_running_moments(self.env), *_running_moments(self)]
        optimizer = [value for entry in self.policy.optimizer.state.values() for value in entry.values()]
        return {
            "parameters": _fingerprint(self.policy.state_dict().values()),
            "state of the optimizer": _fingerprint(value for value in optimizer if isinstance(value, th.Tensor)),
            "running statistics": _fingerprint(moment for rms in moments for moment in (rms.mean, rms.var, rms.count)),
            "number of steps": str((self.num_timesteps, self._n_updates)),
        }

    def _take_part(self, collect: Callable[[], bool]) -> bool:
        """
        Collect, while all others do, and bring together what all have seen.

        :param collect: fills the buffer; returns False if a callback has stopped the training
        :return: False if it was stopped in any process
        """
        steps_before, fingerprints = self.num_timesteps, self._fingerprints()
        episodes_before: dict[str, Any] = {name: getattr(self, name) for name in EPISODE_BUFFERS}
        for name, buffer in episodes_before.items():
            setattr(self, name, deque(buffer))
        with merged(_running_moments(self.env), self._ranks):
            goes_on = collect()
        episodes = {name: list(getattr(self, name))[len(buffer) :] for name, buffer in episodes_before.items()}
        reports: list[Report] = self._ranks.gather_objects(
            Report(goes_on, self.num_timesteps - steps_before, episodes, fingerprints)
        )
        check_fingerprints([report.fingerprints for report in reports])
        self.num_timesteps = steps_before + sum(report.steps for report in reports)
        for name, buffer in episodes_before.items():
            ended = [episode for report in reports for episode in report.episodes[name]]
            setattr(self, name, deque([*buffer, *ended], maxlen=buffer.maxlen))
        return all(report.goes_on for report in reports)

    # ---- files

    def _write(
        self,
        path: Source,
        exclude: Iterable[str] | None,
        include: Iterable[str] | None,
        members: dict[str, bytes],
        about: dict[str, Any] | None = None,
    ) -> None:
        if self._place.rank == 0 or hasattr(path, "write"):
            super()._write(path, exclude, include, members, about)

    def _extra_states(self) -> list[dict[str, Any]]:
        return [state for states in self._ranks.gather_objects(super()._extra_states()) for state in states]

    def _restore_own(self, states: list[dict[str, Any]], statistics: Statistics | None, trust: bool) -> None:
        place = self._place
        self._check_normalizer(statistics)
        self._restore_statistics(statistics)
        if len(states) == place.size:
            self.set_extra_state(states[place.rank], trust)
            return
        self._restore_counters(states[0])
        self._last_obs = None
        warnings.warn(
            f"the checkpoint of {len(states)} processes is resumed in {place.size}: parameters and statistics are restored, "
            "environments start new episodes, and random generators new sequences",
            stacklevel=4,
        )
        if self.seed is not None:
            self.set_random_seed(self.seed + self.num_timesteps)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_ranks", "rollout_was_broken_off"]


def synchronized(collect: Collect) -> Collect:
    """
    Make a method that collects a rollout bring together what all processes have seen.

    :param collect: the method, which returns False if a callback has stopped the training
    :return: the method; it returns False if that was so in any process
    """

    @functools.wraps(collect)
    def method(algorithm: DistributedAlgorithm, *args: Any, **kwargs: Any) -> bool:
        own = functools.partial(collect, algorithm, *args, **kwargs)
        goes_on = own() if algorithm._ranks.size == 1 else algorithm._take_part(own)
        algorithm.rollout_was_broken_off = not goes_on
        algorithm._iteration += goes_on
        return goes_on

    return cast("Collect", method)


def kept_callbacks(callback: MaybeCallback) -> list[BaseCallback]:
    """
    The callbacks that are called in every process, not in the first alone.

    :param callback: what the user has given to ``learn``
    :return: those whose attribute ``on_every_rank`` is True
    """
    given = callback.callbacks if isinstance(callback, CallbackList) else callback
    single = given if isinstance(given, list) else [given]
    return [each for each in single if isinstance(each, BaseCallback) and getattr(each, "on_every_rank", False)]


def check_fingerprints(fingerprints: list[dict[str, str]]) -> None:
    """
    See that all processes are where they should be.

    :param fingerprints: of each process, by the name of what they are taken from
    :raises RankError: they differ; names those that are not like most of the others, or not like the first
    """
    for what, first in fingerprints[0].items():
        values = [of_rank[what] for of_rank in fingerprints]
        common, count = Counter(values).most_common(1)[0]
        expected = common if 2 * count > len(values) else first
        others = [rank for rank, value in enumerate(values) if value != expected]
        if others:
            raise RankError(
                others,
                f"rank {', '.join(map(str, others))} has come to another {what} than the others; no update was made from this "
                "rollout. All processes must start from the same file, and have the same hardware, versions and arguments",
            )


def _fingerprint(values: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for value in values:
        array = value.detach().cpu().numpy() if isinstance(value, th.Tensor) else np.asarray(value)
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _running_moments(holder: VecEnv | SavedAlgorithm | None) -> list[RunningMeanStd]:
    """The running moments that an environment's ``VecNormalize``, or an algorithm, keeps."""
    if isinstance(holder, SavedAlgorithm):
        return [value for value in vars(holder).values() if isinstance(value, RunningMeanStd)]
    normalizer = None if holder is None else unwrap_vec_normalize(holder)
    return [] if normalizer is None or not normalizer.training else list(running_moments(normalizer).values())
