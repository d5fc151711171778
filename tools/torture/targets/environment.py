"""Environment variables of a launcher, and the addresses at which processes meet."""

import os
import random
from pathlib import Path
from unittest import mock

from config import DistOptions
from distributed.environment import launched, number
from distributed.meeting import address
from tools.torture.targets import Target
from tools.torture.targets.mutation import mutated_text, odd_number, odd_text

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_NUMBERS += ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NNODES")
_NUMBERS += ("TORCHELASTIC_MAX_RESTARTS",)
_URLS = ("env://", "tcp://host:29500", "tcp://[::1]:1", "tcp://user@host:2", "host:29500")


def _variables(rng: random.Random) -> dict[str, str]:
    """Variables of a launcher, some of which are odd."""
    found = {"MASTER_ADDR": "localhost"} if rng.random() < 0.8 else {}
    for name in _NUMBERS:
        chance = rng.random()
        if chance < 0.6:
            found[name] = str(rng.randrange(-1, 5))
        elif chance < 0.8:
            value = odd_text(rng) if rng.random() < 0.7 else str(odd_number(rng))
            # As the system could hand it over.
            found[name] = os.fsdecode(value.encode("utf-8", "replace").replace(b"\0", b""))
    return found


def _launch(variables: dict[str, str], folder: Path) -> None:
    with mock.patch.dict(os.environ, variables, clear=True):
        processes = launched(DistOptions())
        assert 0 <= processes.rank < processes.world_size
        assert processes.local_rank >= 0 and processes.local_world_size >= 1
        assert number("TORCHELASTIC_MAX_RESTARTS", 0) >= 0
        host, port = address("env://")
        assert host and 0 < port < 65536


def _resolve(url: str, folder: Path) -> None:
    with mock.patch.dict(os.environ, {"MASTER_ADDR": "host", "MASTER_PORT": "1"}):
        host, port = address(url)
    assert host and 0 < port < 65536


TARGETS = (
    Target("environment of a launcher", _variables, _launch),
    Target("addresses to meet at", lambda rng: mutated_text(rng, _URLS), _resolve),
)
