"""The processes that take one common step, and the sums over all of them: the only place that talks to torch.distributed.

Whatever the update computes from a rollout is a sum over its states: objective, KL, gradient, Fisher product, Kronecker
factors, regression. With a share of the states in every process, summing the sums gives all of them the numbers that one
process with all states would have; everything else in the update is a function of those, and so the same everywhere.
"""

import atexit
import os
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch as th
import torch.distributed as dist

from sb3_trpo.errors import RankError
from sb3_trpo.optim.parameters import flatten, unflatten

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

#: What ``torchrun`` tells each process, and any other launcher may.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankInfo(NamedTuple):
    """
    Where a process stands among those that were launched together.

    :param rank: its number
    :param size: how many there are
    """

    rank: int
    size: int


SINGLE_RANK = RankInfo(0, 1)


def detect_rank(distributed: bool | None) -> RankInfo:
    """
    Find out whether other processes were launched with this one.

    :param distributed: the user's word: True if there must be others, False if they do not matter, None to find out
    :return: where this process stands
    :raises ValueError: there must be others, and no launcher has made any
    """
    if distributed is False:
        return SINGLE_RANK
    if dist.is_available() and dist.is_initialized():
        return RankInfo(dist.get_rank(), dist.get_world_size())
    if all(name in os.environ for name in LAUNCHER_VARIABLES):
        return RankInfo(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    if distributed:
        raise ValueError(
            "distributed=True is not allowed in a process of its own: start the script with torchrun, or set "
            f"{', '.join(LAUNCHER_VARIABLES)}; None finds out by itself"
        )
    return SINGLE_RANK


def local_device(device: th.device | str, place: RankInfo) -> th.device | str:
    """
    The graphics card of this process, where several of a machine have one each.

    :param device: the user's choice
    :param place: where this process stands
    :return: the choice, or the card with the process' number on its machine where the choice leaves it open
    """
    is_open = str(device) in ("auto", "cuda")
    if place.size == 1 or not is_open or not th.cuda.is_available():
        return device
    return th.device("cuda", int(os.environ.get("LOCAL_RANK", place.rank)) % th.cuda.device_count())


class StragglerMonitor:
    """
    How far each process has come, in a store that all of them reach: it tells who is missing when something goes wrong.

    :param place: where this process stands
    :param store: torch.distributed's store
    """

    def __init__(self, place: RankInfo, store: "Store") -> None:
        self._place, self._store = place, store
        self._marks = 0

    def mark(self) -> None:
        """Leave word that this process has come one sum further."""
        self._marks += 1
        self._store.set(str(self._place.rank), str(self._marks))

    def late(self) -> list[int]:
        """
        Find out who is missing.

        :return: the processes that have not come as far as this one; none if that cannot be known any more
        """
        try:
            marks = {key: self._store.get(key) for key in map(str, range(self._place.size)) if self._store.check([key])}
        except RuntimeError:  # the store has gone with the process that held it
            return []
        return [rank for rank in range(self._place.size) if int(marks.get(str(rank), b"0")) < self._marks]


class ProcessGroup:
    """
    All processes of a training, as one of them sees them. Every method but the properties must be called by all of them.

    A training by one process alone has :data:`SINGLE_PROCESS`, for which every sum is the number itself.

    :param place: where this process stands
    :param n_envs: number of environments of each process
    :param trace: how far each of them has come; None if that is not known
    """

    def __init__(
        self, place: RankInfo = SINGLE_RANK, n_envs: Sequence[int] = (1,), trace: StragglerMonitor | None = None
    ) -> None:
        self.rank, self.size = place
        self.n_envs = list(n_envs)
        self._trace = trace

    def sum(self, tensor: th.Tensor) -> th.Tensor:
        """
        Sum over the processes.

        :param tensor: of the same shape everywhere; it stays as it is
        :return: Σ of the processes' tensors, the same bits everywhere
        """
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def sum_each(self, tensors: Sequence[th.Tensor]) -> Sequence[th.Tensor]:
        """
        Sum several tensors of one type over the processes, in one exchange.

        :param tensors: at least one, of the same shapes everywhere
        :return: their sums
        """
        return tensors if self.size == 1 else unflatten(self.sum(flatten(tensors)), tensors)

    def max(self, tensor: th.Tensor) -> th.Tensor:
        """
        Largest over the processes, element by element.

        :param tensor: of the same shape everywhere
        :return: maximum of the processes' tensors
        """
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def _reduced(self, tensor: th.Tensor, operation: Any) -> th.Tensor:
        if self.size == 1:
            return tensor
        result = tensor.detach().clone(memory_format=th.contiguous_format)
        self._call(dist.all_reduce, result, op=operation)
        return result

    def gather(self, tensor: th.Tensor) -> th.Tensor:
        """
        Collect a tensor of each process.

        :param tensor: of the same shape everywhere
        :return: all of them, shape ``(size, ...)``, in the order of the ranks
        """
        if self.size == 1:
            return tensor.unsqueeze(0)
        rows = [th.empty_like(tensor) for _ in range(self.size)]
        self._call(dist.all_gather, rows, tensor.contiguous())
        return th.stack(rows)

    def gather_objects(self, value: Any) -> list[Any]:
        """
        Collect an object of each process.

        :param value: anything that can be pickled
        :return: all of them, in the order of the ranks
        """
        values = [value] * self.size
        if self.size > 1:
            self._call(dist.all_gather_object, values, value)
        return values

    def broadcast(self, tensors: Sequence[th.Tensor]) -> None:
        """
        Give all processes the values of the first.

        :param tensors: of the same shapes everywhere; overwritten in place
        """
        for tensor in tensors if self.size > 1 else ():
            value = tensor.detach().contiguous()
            self._call(dist.broadcast, value, src=0)
            with th.no_grad():
                tensor.copy_(value)

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self._trace is not None:
            self._trace.mark()
        try:
            function(*args, **kwargs)
        except RuntimeError as error:
            late = [] if self._trace is None else self._trace.late()
            who = f"rank {', '.join(map(str, late))}" if late else "a process"
            raise RankError(
                late,
                f"{who} does not answer any more: it has ended, or has not come to this point within the time-out (here: rank "
                f"{self.rank} of {self.size}; torch says: {str(error).splitlines()[0]}). "
                "Look for the first error in the output of all processes; training can go on from the last checkpoint",
            ) from error


SINGLE_PROCESS = ProcessGroup()
_trace: StragglerMonitor | None = None  # of the process group, if it was made here


def join(place: RankInfo, n_envs: int, device: th.device, timeout: float) -> ProcessGroup:
    """
    Meet the other processes, unless that has been done.

    :param place: where this process stands
    :param n_envs: its number of environments
    :param device: device of its networks
    :param timeout: seconds that the processes wait for one another, then and whenever they sum something
    :return: the processes
    :raises RankError: not all of them have come in time
    """
    if place.size == 1:
        return SINGLE_PROCESS
    if not dist.is_initialized():
        _rendezvous(place, device, timeout)
    ranks = ProcessGroup(place, trace=_trace)
    ranks.n_envs = ranks.gather_objects(n_envs)
    return ranks


def _rendezvous(place: RankInfo, device: th.device, timeout: float) -> None:
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # some builds of torch lack them

    global _trace
    wait = timedelta(seconds=timeout)
    # What SB3 keeps in NumPy arrays is summed on the CPU in any case.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, size = next(rendezvous("env://", timeout=wait))
        store.set_timeout(wait)
        store = PrefixStore(_agree_on_prefix(store, place, time.monotonic() + timeout), store)
        dist.init_process_group(backend, timeout=wait, store=PrefixStore("torch", store), rank=rank, world_size=size)
    except (RuntimeError, TimeoutError) as error:
        raise RankError([], f"the {place.size} processes could not meet (time-out: {timeout} seconds): {error}") from error
    _trace = StragglerMonitor(place, PrefixStore("sb3_trpo", store))
    atexit.register(_part)


def _agree_on_prefix(store: "Store", place: RankInfo, deadline: float) -> str:
    """
    Agree on a name that no earlier meeting has had.

    After a restart the launcher's store still holds what the processes before have left there, their addresses among it. So
    the first process makes up a name and calls out the guests, who have made up names of their own; a guest goes by the call
    that it is in, and the first process waits until all have answered.
    """
    own = uuid.uuid4().hex
    guests = [f"guest {rank}" for rank in range(1, place.size)]
    if place.rank > 0:
        store.set(guests[place.rank - 1], own)
    while time.monotonic() < deadline:
        if place.rank == 0 and store.check(guests):
            store.set("call", " ".join([own, *(name.decode() for name in store.multi_get(guests))]))
            if store.check([f"{own} {guest}" for guest in guests]):
                return own
        elif place.rank > 0 and store.check(["call"]):
            name, *called = store.get("call").decode().split()
            if own in called:
                store.set(f"{name} {guests[place.rank - 1]}", "here")
                return name
        time.sleep(0.02)
    raise TimeoutError("not all of them have come")


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
