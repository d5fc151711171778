"""TensorBoard's files: on a disk that fills up nothing is lost, doubled or cut in half."""

import shutil
from pathlib import Path

import pytest
import torch
from disks import fill, read_only, small_disk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from outputs.events import EventWriter, read_events
from outputs.files import Outputs
from tools.torture.comparing import raw_records


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


def write_steps(folder: Path, first: int, last: int, update: int = 0, **more: object) -> Path:
    """A session that writes scalars for steps ``first`` to ``last``; returns its file."""
    writer = EventWriter(folder, Outputs(), update, **more)
    for step in range(first, last + 1):
        writer.add_scalar("a", step / 2, step)
    path = writer.file_writer.event_writer.path
    writer.close()
    return path


def raw_steps(folder: Path) -> dict[tuple[str, int], int]:
    """How often each tag and step is in the files, also where TensorBoard would hide it."""
    return {key: len(values) for key, values in raw_records(folder).items()}


def once(first: int, last: int) -> dict[tuple[str, int], int]:
    return {("a", step): 1 for step in range(first, last + 1)}


def test_a_resumed_run_cuts_off_what_came_after(tmp_path):
    """In the files, not only for readers that know of steps to hide."""
    write_steps(tmp_path, 1, 6)
    write_steps(tmp_path, 4, 9, update=3)
    write_steps(tmp_path, 5, 7, update=4)
    assert raw_steps(tmp_path) == once(1, 7)
    assert steps(tmp_path) == [(step, step / 2) for step in range(1, 8)]


def test_a_run_that_starts_anew_leaves_nothing_of_an_earlier_one(tmp_path):
    write_steps(tmp_path, 1, 6)
    others = {tmp_path / name for name in ("notes.txt", "events.out.tfevents.1700000000.x.7.0.v2")}
    for path in others:
        path.touch()
    own = write_steps(tmp_path, 1, 2)
    assert set(tmp_path.iterdir()) == {own, *others}
    assert steps(tmp_path) == [(1, 0.5), (2, 1.0)]


def test_files_are_in_order_though_the_clock_went_back(tmp_path, monkeypatch):
    """TensorBoard reads them by their names, and what a later one hides depends on the order."""
    files = []
    for number, clock in enumerate((2e9, 1e9, 5e8, 5e8)):
        monkeypatch.setattr("outputs.events.time.time", lambda clock=clock: clock)
        files.append(write_steps(tmp_path, 3 * number + 1, 3 * number + 3, update=3 * number))
    assert files == sorted(files)
    assert steps(tmp_path) == [(step, step / 2) for step in range(1, 13)]


@pytest.mark.parametrize("damage", ["cut", "zeros", "flip", "length"])
def test_a_record_that_is_not_whole_goes_with_what_is_behind_it(tmp_path, damage):
    path = write_steps(tmp_path, 1, 6)
    ends = [end for end, _ in read_events(path)]  # of the head, then of the steps
    data = bytearray(path.read_bytes())
    start = ends[4]  # of step 5
    if damage == "cut":
        data = data[: start + 20]
    elif damage == "zeros":
        data[start:] = bytes(len(data) - start)
    elif damage == "flip":
        data[start + 16] ^= 1
    else:
        data[start : start + 8] = b"\xff" * 8
    path.write_bytes(data)
    write_steps(tmp_path, 5, 6, update=4)
    assert path.stat().st_size == start
    assert raw_steps(tmp_path) == once(1, 6)


def test_what_comes_again_for_the_last_update_goes(tmp_path):
    """A checkpoint within an epoch is older than the epoch's scores, which have its update."""
    writer = EventWriter(tmp_path, Outputs())
    for tag, step in (("step/loss", 5), ("step/loss", 6), ("weights/w", 6), ("epoch/loss", 6)):
        writer.add_scalar(tag, 1.0, step)
    writer.close()
    EventWriter(tmp_path, Outputs(), 6, ("weights/", "epoch/"))
    assert raw_steps(tmp_path) == {("step/loss", 5): 1, ("step/loss", 6): 1}
    # That session logs the epoch and saves it, so that the next keeps all of it.
    again = EventWriter(tmp_path, Outputs(), 6, ("weights/", "epoch/"))
    again.add_scalar("epoch/loss", 2.0, 6)
    again.close()
    EventWriter(tmp_path, Outputs(), 6)
    kept = {("step/loss", 5): 1, ("step/loss", 6): 1, ("epoch/loss", 6): 1}
    assert raw_steps(tmp_path) == kept
    EventWriter(tmp_path, Outputs(), 6, ("step/", "epoch/"))
    assert raw_steps(tmp_path) == {("step/loss", 5): 1}


def test_what_the_end_wrote_goes_and_the_graph_stays(tmp_path):
    writer = EventWriter(tmp_path, Outputs())
    writer.add_graph(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    writer.add_scalar("a", 1.0, 3)
    writer.add_final({"lr": 0.1}, {"final/acc": 50.0}, 3)
    writer.close()
    assert not writer.has_graph
    again = EventWriter(tmp_path, Outputs(), 3)
    again.add_final({"lr": 0.1}, {"final/acc": 60.0}, 3)
    again.close()
    assert again.has_graph
    found = raw_steps(tmp_path)
    assert set(found.values()) == {1} and ("final/acc", 3) in found and ("graph", 0) in found
    assert read(tmp_path).Scalars("final/acc")[0].value == 60.0


def test_files_that_cannot_be_cut_are_said_and_cut_later(tmp_path, caplog):
    """The own file is not among them, though it is there by then."""
    with small_disk(tmp_path / "disk", 256) as disk:
        write_steps(disk, 1, 6)
        outputs = Outputs()
        read_only(disk)
        writer = EventWriter(disk, outputs, 3)
        assert caplog.text.count("not written") == 2  # the earlier file, its own
        for step in (4, 5):
            writer.add_scalar("a", step / 2, step)
        read_only(disk, on=False)
        writer.flush()
        outputs.retry()
        writer.close()
        assert raw_steps(disk) == once(1, 5)


def test_all_kinds_of_events(tmp_path):
    writer = EventWriter(tmp_path, Outputs())
    writer.add_histogram("h", torch.arange(10.0), 1)
    writer.add_image("i", torch.zeros(3, 4, 4), 1)
    writer.add_graph(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    writer.add_final({"lr": 0.1, "opt": "adamw"}, {"final/acc": 50.0}, 1)
    writer.close()
    found = read(tmp_path)
    assert found.Tags()["histograms"] == ["h"] and found.Tags()["images"] == ["i"]
    assert found.Tags()["graph"] and found.Scalars("final/acc")[0].value == 50.0
    plugin = found.summary_metadata["_hparams_/session_start_info"].plugin_data
    assert b"adamw" in plugin.content
    assert len(list(tmp_path.iterdir())) == 1
