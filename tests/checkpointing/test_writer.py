"""Writers of both kinds: what they save, when, and what becomes of errors."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from disks import fill, small_disk
from runs import on_each_process
from torch import nn

from checkpointing.files import load_checkpoint
from checkpointing.folder import BEST, checkpoints_in
from checkpointing.writer import IdleWriter, PlainWriter, open_writer
from distributed.wrapping import shard


def content(weights: torch.Tensor, epoch: int, samples: int = 0) -> dict:
    progress = {"epoch": epoch, "samples": samples}
    return {"model": {"w": weights}, "model_ema": None, "progress": progress, "optimizer": {}}


def no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_what_is_saved_is_the_content_of_that_moment(tmp_path):
    writer = PlainWriter(tmp_path, keep=9)
    weights = torch.zeros(1000)
    for epoch in range(1, 4):
        writer.save(content(weights, epoch), best=epoch == 2)
        weights += 1
    writer.wait()
    assert writer.saved == tmp_path / "checkpoint-0003.pth" and writer.error is None
    for epoch in range(1, 4):
        saved = load_checkpoint(tmp_path / f"checkpoint-{epoch:04d}.pth")
        assert torch.equal(saved["model"]["w"], torch.full((1000,), epoch - 1.0))
    assert torch.equal(load_checkpoint(tmp_path / BEST)["model"]["w"], torch.ones(1000))


def test_the_newest_are_kept(tmp_path):
    writer = PlainWriter(tmp_path, keep=2)
    for samples in (0, 8, 16):
        writer.save(content(torch.zeros(1), 1, samples))
    writer.wait()
    assert [p.stem for p in checkpoints_in(tmp_path)] == [
        "checkpoint-0001-00000016",
        "checkpoint-0001-00000008",
    ]
    assert not (tmp_path / BEST).exists()


def test_an_error_is_kept_until_a_write_succeeds(tmp_path, monkeypatch, caplog):
    writer = PlainWriter(tmp_path, keep=9)
    writer.save(content(torch.zeros(1), 1))
    writer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", no_space)
        writer.save(content(torch.zeros(1), 2))
        writer.wait()
    assert writer.error.errno == 28
    assert writer.saved == tmp_path / "checkpoint-0001.pth"
    said = f"not written: {tmp_path / 'checkpoint-0002.pth'}: No space left on device"
    assert said in caplog.text and caplog.text.count("training goes on, older ones stay") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-0001.pth"]
    writer.save(content(torch.zeros(1), 3))
    writer.wait()
    assert writer.error is None
    assert writer.saved == tmp_path / "checkpoint-0003.pth"


def test_best_weights_without_room_are_written_with_the_next_save(tmp_path, monkeypatch, caplog):
    """Though their own checkpoint is gone by then."""
    writer = PlainWriter(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr("checkpointing.writer.set_best", no_space)
        writer.save(content(torch.ones(1), 1), best=True)
        writer.wait()
    assert writer.lacks_best and writer.error is None
    assert f"{tmp_path / BEST}: No space left on device" in caplog.text
    writer.save(content(torch.zeros(1), 2))
    writer.wait()
    assert not writer.lacks_best
    assert torch.equal(load_checkpoint(tmp_path / BEST)["model"]["w"], torch.ones(1))
    assert [p.name for p in checkpoints_in(tmp_path)] == ["checkpoint-0002.pth"]


def test_one_process_writes(tmp_path):
    main = open_writer(tmp_path, keep=1, sharded=False, is_main=True)
    other = open_writer(tmp_path, keep=1, sharded=False, is_main=False)
    assert type(main) is PlainWriter and type(other) is IdleWriter
    other.save(content(torch.zeros(1), 1), best=True)
    other.wait()
    assert other.saved is None and other.error is None
    assert list(tmp_path.iterdir()) == []


# --- sharded --------------------------------------------------------------------------------------


def save_sharded(folder: Path, rank: int, failing: bool) -> dict:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    shard(model, torch.device("cpu"), None)
    model[1].running_mean.fill_(rank + 1.0)
    writer = open_writer(folder, keep=1, sharded=True, is_main=rank == 0)
    for epoch in (1, 2):
        state = {"model": model.state_dict(), "model_ema": None, "optimizer": {"step": epoch}}
        writer.save(state | {"progress": {"epoch": epoch, "samples": 0}}, best=epoch == 2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
    writer.wait()
    if failing and rank == 1:
        dcp.FileSystemWriter.write_data = no_space
    if failing:
        writer.save(state | {"progress": {"epoch": 3, "samples": 0}})
        writer.wait()
    return {
        "saved": writer.saved.name,
        "error": str(writer.error),
        "mean": model[1].running_mean.tolist(),
    }


def test_sharded_checkpoints_hold_the_whole_model(tmp_path):
    reports = on_each_process(tmp_path, 2, lambda rank: save_sharded(tmp_path, rank, False))
    # Statistics of batch norm are the main process's, in the running model too.
    expected = {"saved": "checkpoint-0002.shards", "error": "None", "mean": [1.0] * 4}
    assert reports == [expected, expected]
    assert [p.name for p in checkpoints_in(tmp_path)] == ["checkpoint-0002.shards"]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for saved in (
        load_checkpoint(tmp_path / "checkpoint-0002.shards"),
        load_checkpoint(tmp_path / BEST),
    ):
        for key, parameter in model.named_parameters():
            assert torch.equal(saved["model"][key], parameter + 1), key
        assert torch.equal(saved["model"]["1.running_mean"], torch.ones(4))
        assert saved["progress"]["epoch"] == 2
    assert "optimizer" not in saved


@pytest.mark.parametrize("leave", [0, 8192, 131072])
def test_sharded_checkpoints_on_a_full_disk(tmp_path, leave):
    """What has no room leaves nothing behind, and the older one stays; with room it goes on."""

    def work(rank: int) -> list:
        model = nn.Sequential(nn.Linear(100, 400))
        shard(model, torch.device("cpu"), None)
        writer = open_writer(disk, keep=1, sharded=True, is_main=rank == 0)
        found = []
        for epoch in (1, 2, 3):
            if rank == 0 and epoch > 1:
                fill(disk, leave) if epoch == 2 else (disk / "fill").unlink()
            dist.barrier()
            state = {"model": model.state_dict(), "model_ema": None, "optimizer": {}}
            writer.save(state | {"progress": {"epoch": epoch, "samples": 0}}, best=epoch > 1)
            writer.wait()
            dist.barrier()
            left = sorted(p.name for p in disk.iterdir() if p.name.startswith("."))
            found.append([writer.saved.name, writer.error and writer.error.strerror, left])
            dist.barrier()
        return [*found, writer.lacks_best]

    with small_disk(tmp_path / "disk", 8192) as disk:
        for report in on_each_process(tmp_path, 2, work):
            first, second, third, lacks_best = report
            assert first == ["checkpoint-0001.shards", None, []]
            assert second[0] == "checkpoint-0001.shards" and second[2] == []
            assert "No space left on device" in second[1] and "enforce" not in second[1]
            assert third == ["checkpoint-0003.shards", None, []] and not lacks_best
        assert load_checkpoint(disk / BEST)["progress"]["epoch"] == 3
        saved = load_checkpoint(disk / "checkpoint-0003.shards")["model"]["0.weight"]
        assert saved.shape == (400, 100)


def test_an_error_on_one_process_is_known_to_all(tmp_path):
    reports = on_each_process(tmp_path, 2, lambda rank: save_sharded(tmp_path, rank, True))
    for report in reports:
        assert report["saved"] == "checkpoint-0002.shards"
        assert "No space left on device" in report["error"]
    assert [p.name for p in checkpoints_in(tmp_path)] == ["checkpoint-0002.shards"]
