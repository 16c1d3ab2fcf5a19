"""
What scripts that measure time share: threads, clocks and alternation.

Import this module before NumPy and torch: it keeps every library to one thread, unless the environment says otherwise.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

#: Choices of ``--clock``. CPU seconds are those of this process: use them where other work shares the cores.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}

Name = TypeVar("Name")
Sample = TypeVar("Sample")


def alternate(contenders: Mapping[Name, Callable[[], Sample]], rounds: int, warmup: int = 0) -> dict[Name, list[Sample]]:
    """
    Call the contenders in turn, round after round, for times that other work on the machine disturbs alike.

    :param contenders: what to call, by name
    :param rounds: rounds to keep
    :param warmup: rounds before, not kept
    :return: the results of each contender, one per round
    """
    samples: dict[Name, list[Sample]] = {name: [] for name in contenders}
    for number in range(-warmup, rounds):
        for name, call in contenders.items():
            sample = call()
            if number >= 0:
                samples[name].append(sample)
    return samples


def seconds_of(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """
    Time a call.

    :param call: the call
    :param clock: one of :data:`CLOCKS`
    :return: its seconds
    """
    started = clock()
    call()
    return clock() - started


def medians(samples: list[dict[str, Any]], digits: int = 3) -> dict[str, float]:
    """
    Return the median of each figure.

    :param samples: rows with the same keys
    :param digits: to round to
    :return: one row
    """
    return {key: round(statistics.median(sample[key] for sample in samples), digits) for key in samples[0]}
