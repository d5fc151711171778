"""Where a process stands among others, as its launcher's environment says."""

import os

from config import DistOptions
from distributed.processes import Processes
from errors import OptionError

_SLURM_PORT = 29500


def launched(options: DistOptions) -> Processes:
    """This process as torchrun, SLURM or whoever else started it describes it.

    Raises OptionError that names the variable if one has no possible value.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        world = number("WORLD_SIZE", low=1)
        rank = _rank("RANK", world)
        local_world = number("LOCAL_WORLD_SIZE", 1, low=1)
        local_rank = number("LOCAL_RANK", 0)
    elif number("SLURM_NTASKS", 1, low=1) > 1 and "SLURM_PROCID" in env:
        world = number("SLURM_NTASKS", low=1)
        rank = _rank("SLURM_PROCID", world)
        local_rank = number("SLURM_LOCALID", 0)
        local_world = max(1, world // number("SLURM_NNODES", 1, low=1))
        env.setdefault("MASTER_PORT", str(_SLURM_PORT))
        if options.dist_url == "env://" and "MASTER_ADDR" not in env:
            raise OptionError(
                "dist_url",
                "SLURM started several tasks but MASTER_ADDR is not set: export it, "
                "use --dist-url tcp://HOST:PORT, or launch with run_with_submitit.py",
            )
    else:
        _refuse_half_an_environment(options)
        return Processes()
    if options.world_size not in (1, world):
        raise OptionError(
            "world_size", f"{options.world_size}, but the launcher started {world} processes"
        )
    if "LOCAL_WORLD_SIZE" in env and local_rank >= local_world:
        raise OptionError(
            "distributed",
            f"LOCAL_RANK is {local_rank}, but LOCAL_WORLD_SIZE says that this machine has "
            f"{local_world} process(es): give each a number from 0 to {local_world - 1}",
        )
    return Processes(rank, world, local_rank, local_world)


def _refuse_half_an_environment(options: DistOptions) -> None:
    """Raise OptionError if this process is one of several and doesn't know which."""
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if given:
        missing = "WORLD_SIZE" if given == ["RANK"] else "RANK"
        raise OptionError(
            "distributed",
            f"{given[0]} is set and {missing} is not: set both, as torchrun does, or unset "
            f"{given[0]} to train with one process",
        )
    if options.distributed or options.world_size > 1:
        raise OptionError(
            "distributed",
            "no launcher started this process (RANK and WORLD_SIZE are not set): start "
            "with torchrun --nproc-per-node N main.py …",
        )


def _rank(variable: str, world: int) -> int:
    rank = number(variable)
    if rank >= world:
        raise OptionError("world_size", f"{world} processes have no number {rank}: see {variable}")
    return rank


def number(variable: str, default: int | None = None, *, low: int = 0, high: int = 2**31) -> int:
    """The whole number in an environment variable.

    Args:
        variable: its name.
        default: where it isn't set; without one it must be set.
        low, high: the least and the greatest possible value.

    Raises:
        OptionError: it is no such number.
    """
    text = os.environ.get(variable)
    if text is None and default is not None:
        return default
    # Not int(): that takes "1_000" and digits of other scripts.
    plain = (text or "").strip()
    value = int(plain) if plain.isascii() and plain.isdigit() and len(plain) < 12 else -1
    if low <= value <= high:
        return value
    wanted = f"a whole number from {low} to {high}" if high < 2**31 else f"a number from {low} on"
    shown = "not set" if text is None else repr(text[:40])
    raise OptionError(
        "distributed",
        f"the environment variable {variable} is {shown}, it must be {wanted}: mend it, or unset "
        f"{variable} if no launcher is to set it",
    )
