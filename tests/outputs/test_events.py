"""TensorBoard's files: on a disk that fills up nothing is lost, doubled or cut in half."""

import shutil
from pathlib import Path

import pytest
import torch
from disks import fill, read_only, small_disk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from outputs.events import EventWriter
from outputs.files import Outputs


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    found.Reload()
    return found


def steps(folder: Path, tag: str = "a") -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def is_whole(file: Path) -> bool:
    """Whether the file ends with a record: length, its checksum, data, their checksum."""
    data, place = file.read_bytes(), 0
    while place < len(data):
        place += 8 + 4 + int.from_bytes(data[place : place + 8], "little") + 4
    return place == len(data)


@pytest.mark.parametrize("room", [0, 1, 4096, 8192])
def test_what_a_full_disk_refuses_comes_later(tmp_path, caplog, room):
    """Whatever room there is, from none to some pages: in the end all is there, once."""
    with small_disk(tmp_path / "disk", 256) as disk:
        filler = fill(disk, leave=room)
        writer = EventWriter(disk / "tb", Outputs())
        for step in range(200):
            writer.add_scalar("a", step / 2, step)
            if step % 50 == 49:
                writer.flush()
            if step == 120:
                for file in (disk / "tb").glob("*"):
                    assert file.stat().st_size == 0 or steps(disk / "tb")  # no half record
        filler.unlink()
        writer.close()
        assert steps(disk / "tb") == [(step, step / 2) for step in range(200)]
        assert len(list((disk / "tb").iterdir())) == 1
    assert caplog.text.count("not written") == (room < 8192)


def test_a_disk_that_was_read_only_for_a_while(tmp_path):
    with small_disk(tmp_path / "disk", 256) as disk:
        writer = EventWriter(disk / "tb", Outputs())
        for step in range(9):
            writer.add_scalar("a", step, step)
            writer.flush()
            read_only(disk, step in (2, 3, 4))
        writer.close()
        assert [step for step, _ in steps(disk / "tb")] == list(range(9))


def test_a_folder_that_was_removed(tmp_path):
    writer = EventWriter(tmp_path / "tb", Outputs())
    writer.add_scalar("a", 1.0, 1)
    writer.flush()
    shutil.rmtree(tmp_path / "tb")
    writer.add_scalar("a", 2.0, 2)
    writer.close()
    assert steps(tmp_path / "tb") == [(2, 2.0)]


def test_a_resumed_run_hides_what_came_after(tmp_path):
    for purge, values in ((None, range(6)), (3, range(10, 12))):
        writer = EventWriter(tmp_path, Outputs(), purge)
        for step, value in enumerate(values, purge or 0):
            writer.add_scalar("a", value, step)
        writer.close()
    assert steps(tmp_path) == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 10.0), (4, 11.0)]


def test_all_kinds_of_events(tmp_path):
    writer = EventWriter(tmp_path, Outputs())
    writer.add_histogram("h", torch.arange(10.0), 1)
    writer.add_image("i", torch.zeros(3, 4, 4), 1)
    writer.add_graph(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    writer.add_final({"lr": 0.1, "opt": "adamw"}, {"final/acc": 50.0})
    writer.close()
    found = read(tmp_path)
    assert found.Tags()["histograms"] == ["h"] and found.Tags()["images"] == ["i"]
    assert found.Tags()["graph"] and found.Scalars("final/acc")[0].value == 50.0
    plugin = found.summary_metadata["_hparams_/session_start_info"].plugin_data
    assert b"adamw" in plugin.content
    assert len(list(tmp_path.iterdir())) == 1
