"""Seeds, the state of generators, devices, and files that are written whole."""

import errno
import os
import random
import stat

import numpy as np
import pytest
import torch

import utils
from errors import OptionError


def draws() -> list:
    """A number from each global generator."""
    return [random.random(), np.random.rand(), torch.rand(1).item()]


def test_seeds_depend_on_all_parts():
    seeds = {
        utils.derive_seed(*parts)
        for parts in ((1,), (2,), (1, "step"), (1, "sample"), (1, "step", 0), (1, "step", 0, 0))
    }
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert utils.derive_seed(1, "step", 2) == utils.derive_seed(1, "step", 2)


@pytest.mark.parametrize("seed_with", [utils.seed_all, utils.seed_host])
def test_seeding_repeats_the_draws(seed_with):
    seed_with(2**63 - 1)  # NumPy takes 32 bits
    first = draws()
    seed_with(2**63 - 1)
    assert draws() == first
    seed_with(7)
    assert draws() != first


def test_state_of_the_generators_comes_back_from_a_file(tmp_path):
    utils.seed_all(3)
    np.random.randn()  # leaves a second value in store
    torch.save(utils.rng_state(), tmp_path / "state.pth")
    expected = [*draws(), np.random.randn()]
    draws()
    utils.set_rng_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert [*draws(), np.random.randn()] == expected


@pytest.mark.parametrize("name", ["cpu:first", "tpu", "meta"])
def test_unknown_devices(name):
    with pytest.raises(OptionError, match="is none of auto, cpu, cuda, cuda:N, mps"):
        utils.pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_devices_without_cuda():
    assert utils.pick_device("auto") == torch.device("cpu")
    with pytest.raises(OptionError, match="--device: no CUDA device here"):
        utils.pick_device("cuda")
    assert utils.amp_dtype("auto", torch.device("cpu")) is None


def test_precisions():
    cpu = torch.device("cpu")
    assert utils.amp_dtype("off", cpu) is None
    assert utils.amp_dtype("bf16", cpu) is torch.bfloat16
    assert utils.amp_dtype("fp16", cpu) is torch.float16
    with pytest.raises(OptionError, match="--amp: fp16 needs loss scaling"):
        utils.amp_dtype("fp16", torch.device("mps"))


def test_copies_share_no_memory():
    weights = torch.ones(2)
    content = {"a": [weights, (weights, 3)], "b": "text"}
    copy = utils.copy_to_host(content)
    weights.zero_()
    assert torch.equal(copy["a"][0], torch.ones(2)) and torch.equal(copy["a"][1][0], torch.ones(2))
    assert copy["a"][1][1] == 3 and copy["b"] == "text"


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, durable):
    path = tmp_path / "figure.png"
    with utils.written_whole(path, durable=durable) as temporary:
        temporary.write_text("old")
        assert temporary.suffix == ".png" and not path.exists()
    with pytest.raises(KeyboardInterrupt), utils.written_whole(path, durable=durable) as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with utils.written_whole(path, durable=durable) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["figure.png"]


def test_a_durable_file_is_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (events.append("sync"), sync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    for durable in (False, True):
        with utils.written_whole(tmp_path / "x", durable=durable) as temporary:
            temporary.touch()
    assert events == ["rename", "sync", "rename", "sync"]


def test_a_folder_that_cannot_be_synced_costs_a_warning_and_no_file(tmp_path, monkeypatch, caplog):
    sync = os.fsync

    def of_files_alone(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    with utils.written_whole(tmp_path / "x", durable=True) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "x").read_text() == "new" and os.listdir(tmp_path) == ["x"]
    assert "x: its folder can't be synced (Invalid argument)" in caplog.text
