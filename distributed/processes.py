"""The processes that train together, and what they exchange."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from errors import UserError, first_names

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those that train together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    hosts: tuple[str, ...] = ()
    """Of each rank, where they are known."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.world_size > 1

    def called(self, ranks: Sequence[int]) -> str:
        """``rank 2 (host b)`` or ``ranks 2, 3, … (host b)`` for a message."""
        hosts = sorted({self.hosts[rank] for rank in ranks if rank < len(self.hosts)})
        where = f" (host {first_names(hosts, 3)})" if hosts else ""
        return f"rank{'s' if len(ranks) > 1 else ''} {first_names(ranks, 8)}{where}"


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast_buffers(model: torch.nn.Module) -> None:
    """Give every process the main process's buffers (batch-norm statistics)."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        # Not dist.barrier(): with NCCL that would occupy the device.
        dist.all_reduce(torch.zeros(1))


def gather(value: Any) -> list[Any]:
    """``value`` of every process, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is true on any process; to be called by all."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes)


def in_step(items: Iterable[Item]) -> Iterator[Item | None]:
    """The items, then None as long as other processes have some."""
    iterator = iter(items)
    while True:
        item = next(iterator, None)
        if not any_process(item is not None):
            return
        yield item


def on_main_process(processes: Processes, action: Callable[[], None]) -> None:
    """The main process does ``action``; a UserError from it is raised on all processes."""
    failure: list[UserError | None] = [None]
    if processes.is_main:
        try:
            action()
        except UserError as error:
            failure = [error]
    if processes.distributed:
        dist.broadcast_object_list(failure, device=torch.device("cpu"))
    if failure[0] is not None:
        raise failure[0]


@contextmanager
def main_process_first(processes: Processes) -> Iterator[None]:
    """The main process goes through the block alone (it may download), then the others."""
    if not processes.is_main:
        barrier()
    yield
    if processes.is_main:
        barrier()
