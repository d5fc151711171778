"""A process among those that train together: how they meet, agree, work and fail together."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from config import DistOptions
from distributed.agreement import refuse_differences
from distributed.environment import launched
from distributed.meeting import meet
from distributed.processes import Processes, barrier
from distributed.watch import Watch
from errors import Stopped
from utils import pick_device

# Silence is measured by distributed/watch.py, which knows who is silent; torch's own limit would
# also end a run that was suspended for as long.
_NO_LIMIT = timedelta(days=30)


@contextlib.contextmanager
def joined(
    options: DistOptions,
    device_name: str,
    terms: Callable[[torch.device], Mapping[str, str]] = lambda device: {},
) -> Iterator[Processes]:
    """This process among those that torchrun, SLURM or ``--dist-url`` started, if any.

    NCCL carries CUDA tensors and gloo those of the host; on a CPU all is gloo. When a process
    leaves the block with an error, the others leave with a PeerError that names it, also out of an
    exchange that would have waited for it.

    Args:
        options: where the processes meet, and for how long they wait for each other.
        device_name: ``--device``.
        terms: what all must have alike, by name, on the device of this process.

    Raises:
        OptionError: the processes can't meet, or not all of them came.
        UserError: they differ in their terms.
        PeerError: another process failed.
    """
    processes = launched(options)
    if not processes.distributed:
        yield processes
        return
    meeting = meet(options, processes)
    processes = dataclasses.replace(processes, hosts=tuple(p.host for p in meeting.peers))
    watch = Watch(meeting, processes, options.dist_timeout)
    try:
        device = pick_device(device_name, processes.local_rank)
        # Before any exchange of torch's: ranks that differ may do different ones.
        refuse_differences(
            terms(device),
            watch.exchange,
            processes,
            fix="start all processes with the same options, code and packages",
        )
        watch.cuda = device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if watch.cuda else "gloo",
            store=dist.PrefixStore("group", meeting.store),
            rank=processes.rank,
            world_size=processes.world_size,
            timeout=_NO_LIMIT,
        )
        yield processes
        barrier()
    except KeyboardInterrupt:
        raise
    except Stopped as stopped:
        watch.tell(f"process {processes.rank} was {stopped}", stopped.exit_code)
        raise
    except Exception as error:
        raise watch.explain(error) from None
    finally:
        watch.stop()
        if dist.is_initialized():
            dist.destroy_process_group()
