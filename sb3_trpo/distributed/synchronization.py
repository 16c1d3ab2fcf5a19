"""Several processes that take one common step, each with environments of its own."""

import functools
import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_trpo.distributed.moments import merged
from sb3_trpo.errors import RankError
from sb3_trpo.saving.vec_normalize import running_moments

if TYPE_CHECKING:
    from sb3_trpo.base import ResumableAlgorithm

#: Attributes that an update goes by, beside its arguments.
UPDATE_STATE = ("_kl_ratio",)
EPISODE_BUFFERS = ("ep_info_buffer", "ep_success_buffer")

Collect = TypeVar("Collect", bound=Callable[..., bool])


class Report(NamedTuple):
    """
    A process's report to the others at the end of its rollout.

    :param goes_on: False if one of its callbacks stopped the training
    :param steps: environment steps that it took
    :param episodes: statistics of the episodes that ended, by the name of SB3's buffer
    :param fingerprints: hashes of what must be the same in all processes
    """

    goes_on: bool
    steps: int
    episodes: dict[str, list[Any]]
    fingerprints: dict[str, str]


def take_from_first(model: "ResumableAlgorithm") -> None:
    """
    Take over the parameters and the running statistics of the first process.

    :param model: the model
    """
    model._ranks.broadcast([*model.policy.parameters(), *model.policy.buffers()])
    running = [*running_moments_of(model.env), *running_moments_of(model)]
    state = {name: getattr(model, name) for name in UPDATE_STATE}
    first, first_state = model._ranks.gather_objects(([vars(rms) for rms in running], state))[0]
    for rms, values in zip(running, first, strict=True):
        vars(rms).update(values)
    vars(model).update(first_state)


def check_agreement(model: "ResumableAlgorithm", total_timesteps: int) -> None:
    """
    See that all processes have the same arguments and networks.

    :param model: the model
    :param total_timesteps: steps to train for
    :raises ValueError: they have not
    """
    named = {name: getattr(model, name) for name in model.argument_rules}
    arguments = {name: "a schedule" if callable(value) else value for name, value in named.items()}
    shapes = [tuple(tensor.shape) for tensor in model.policy.state_dict().values()]
    own = {"algorithm": model.algorithm(), **arguments, "total_timesteps": total_timesteps, "shapes of the policy": shapes}
    first, *others = model._ranks.gather_objects(own)
    for rank, theirs in enumerate(others, start=1):
        for name, value in theirs.items():
            if name not in first or first[name] != value:
                raise ValueError(f"{name}={value!r} of rank {rank} is not allowed: rank 0 has {first.get(name)!r}")


def _fingerprints(model: "ResumableAlgorithm") -> dict[str, str]:
    moments = [*running_moments_of(model.env), *running_moments_of(model)]
    optimizer = [value for entry in model.policy.optimizer.state.values() for value in entry.values()]
    return {
        "parameters": _fingerprint(model.policy.state_dict().values()),
        "state of the optimizer": _fingerprint(value for value in optimizer if isinstance(value, th.Tensor)),
        "running statistics": _fingerprint(moment for rms in moments for moment in (rms.mean, rms.var, rms.count)),
        "state of the update": str([getattr(model, name) for name in UPDATE_STATE]),
        "number of steps": str((model.num_timesteps, model._n_updates)),
    }


def _take_part(model: "ResumableAlgorithm", collect: Callable[[], bool]) -> bool:
    """
    Collect a rollout in all processes, and combine their statistics.

    :param model: the model
    :param collect: fills the buffer; returns False if a callback has stopped the training
    :return: False if it was stopped in any process
    """
    steps_before, fingerprints = model.num_timesteps, _fingerprints(model)
    episodes_before: dict[str, Any] = {name: getattr(model, name) for name in EPISODE_BUFFERS}
    for name, buffer in episodes_before.items():
        setattr(model, name, deque(buffer))
    with merged(running_moments_of(model.env), model._ranks):
        goes_on = collect()
    episodes = {name: list(getattr(model, name))[len(buffer) :] for name, buffer in episodes_before.items()}
    reports: list[Report] = model._ranks.gather_objects(
        Report(goes_on, model.num_timesteps - steps_before, episodes, fingerprints)
    )
    check_fingerprints([report.fingerprints for report in reports])
    model.num_timesteps = steps_before + sum(report.steps for report in reports)
    for name, buffer in episodes_before.items():
        ended = [episode for report in reports for episode in report.episodes[name]]
        setattr(model, name, deque([*buffer, *ended], maxlen=buffer.maxlen))
    return all(report.goes_on for report in reports)


def synchronized(collect: Collect) -> Collect:
    """
    Make a method that collects a rollout bring together what all processes have seen.

    :param collect: the method, which returns False if a callback has stopped the training
    :return: the method; it returns False if that was so in any process
    """

    @functools.wraps(collect)
    def method(model: "ResumableAlgorithm", *args: Any, **kwargs: Any) -> bool:
        own = functools.partial(collect, model, *args, **kwargs)
        goes_on = own() if model._ranks.size == 1 else _take_part(model, own)
        model.rollout_was_broken_off = not goes_on
        model._iteration += goes_on
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
                f"rank {', '.join(map(str, others))} diverged from the other ranks in: {what}; no update was made from this "
                "rollout. All processes must start from the same file, and have the same hardware, versions and arguments",
            )


def _fingerprint(values: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for value in values:
        array = value.detach().cpu().numpy() if isinstance(value, th.Tensor) else np.asarray(value)
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def running_moments_of(holder: VecEnv | BaseAlgorithm | None) -> list[RunningMeanStd]:
    """
    Return the running moments that an environment's ``VecNormalize``, or an algorithm, updates.

    :param holder: the environment or the algorithm; None for none
    :return: the moments
    """
    if isinstance(holder, BaseAlgorithm):
        return [value for value in vars(holder).values() if isinstance(value, RunningMeanStd)]
    normalizer = None if holder is None else unwrap_vec_normalize(holder)
    return [] if normalizer is None or not normalizer.training else list(running_moments(normalizer).values())
