"""What a launcher says of a process; values that none would give are named."""

import os

import pytest

from config import DistOptions
from distributed.environment import launched
from distributed.processes import Processes
from errors import OptionError

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NNODES": "2"}


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_")) or name in TORCHRUN:
            monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.setenv("MASTER_PORT", "29500")


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, Processes()),
        (TORCHRUN, Processes(1, 4, 1, 2)),
        ({"RANK": " 0 ", "WORLD_SIZE": "2"}, Processes(0, 2)),
        (SLURM, Processes(3, 4, 1, 2)),
        (SLURM | {"SLURM_NTASKS": "1"}, Processes()),
        ({"SLURM_NTASKS": "8"}, Processes()),  # a shell of salloc
    ],
)
def test_launchers(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched(DistOptions()) == expected


@pytest.mark.parametrize(
    "launcher, name, value, said",
    [
        (TORCHRUN, "LOCAL_RANK", "x", "LOCAL_RANK is 'x', it must be a number from 0 on"),
        (TORCHRUN, "LOCAL_RANK", "2", "LOCAL_WORLD_SIZE says .* 2 process"),
        (TORCHRUN, "LOCAL_RANK", "", "LOCAL_RANK is ''"),
        (TORCHRUN, "RANK", "", "RANK is ''"),
        (TORCHRUN, "RANK", "-1", "RANK is '-1'"),
        (TORCHRUN, "RANK", "1_0", "RANK is '1_0'"),
        (TORCHRUN, "RANK", "٣", "RANK is"),
        (TORCHRUN, "RANK", "4", "4 processes have no number 4: see RANK"),
        (TORCHRUN, "RANK", "9" * 4000, "RANK is '9"),
        (TORCHRUN, "WORLD_SIZE", "0", "WORLD_SIZE is '0', it must be a number from 1 on"),
        (TORCHRUN, "LOCAL_WORLD_SIZE", "0.5", "LOCAL_WORLD_SIZE is '0.5'"),
        (SLURM, "SLURM_NTASKS", "2(x2)", r"SLURM_NTASKS is '2\(x2\)'.*unset SLURM_NTASKS"),
        (SLURM, "SLURM_PROCID", "4", "no number 4: see SLURM_PROCID"),
        (SLURM, "SLURM_LOCALID", "a", "SLURM_LOCALID is 'a'"),
        (SLURM, "SLURM_NNODES", "0", "SLURM_NNODES is '0'"),
    ],
)
def test_a_value_that_cannot_be_is_named(monkeypatch, launcher, name, value, said):
    for variable, text in (launcher | {name: value}).items():
        monkeypatch.setenv(variable, text)
    with pytest.raises(OptionError, match=said) as caught:
        launched(DistOptions())
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name, missing", [("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")])
def test_half_of_an_environment_is_not_one_process(monkeypatch, name, missing):
    """It would train alone, beside others that do so too."""
    monkeypatch.setenv(name, "1")
    with pytest.raises(OptionError, match=f"{name} is set and {missing} is not"):
        launched(DistOptions())
