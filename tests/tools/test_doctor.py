"""tools.doctor: what it checks and finds, on a small CNN and real digits."""

import re
import shutil

from before_training import SMALL
from tiny_images import image_folder

from checkpointing.files import load_checkpoint
from tools import doctor


def test_doctor_is_ready_and_leaves_nothing_behind(tmp_path, capsys):
    folder = tmp_path / "runs" / "one"
    assert doctor.main([*SMALL, "--output-dir", str(folder), "--batch-size", "16"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "ready" and "skipped" not in said and "to fix" not in said
    for name in doctor.CHECKS:
        assert re.search(rf"^{name} +ok ", said, re.M)
    assert "train: 1438 images, 10 classes" in said and "89 steps per epoch" in said
    assert list(tmp_path.iterdir()) == []


def test_doctor_goes_on_where_a_check_fails(tmp_path, capsys, monkeypatch):
    (tmp_path / "log.txt").touch()
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    argv = [*SMALL, "--output-dir", str(tmp_path), "--num-workers", "1", "--batch-size", "16"]
    assert doctor.main(argv) == 2
    said = capsys.readouterr().out
    assert "3 to fix:" in said
    for line in (
        "shared memory: --num-workers: /dev/shm has room for the batches of 0 workers, not of 1",
        "already holds a run",
        "disk: 0.00 GiB free",
    ):
        assert line in said.partition("to fix:")[2]
    assert re.search(r"^training +ok ", said, re.M) and re.search(r"^checkpoint +ok ", said, re.M)
    assert [p.name for p in tmp_path.iterdir()] == ["log.txt"]


def test_doctor_names_what_cannot_be_checked(tmp_path, capsys):
    argv = [*SMALL, "--data-set", "IMNET", "--data-path", str(tmp_path / "no")]
    assert doctor.main([*argv, "--output-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert re.search(r"^training +skipped +needs data and model", said, re.M)
    assert "data: --data-path: " in said and "does not exist" in said


def test_doctor_finds_damage_in_the_data_and_on_the_disk(tmp_path, capsys, monkeypatch):
    image_folder(tmp_path / "p", {"train": 4, "val": 4}, classes=("a", "b"))
    (tmp_path / "p/train/b/2.png").write_bytes(b"?")
    load = load_checkpoint

    def flipped(path):
        content = load(path)
        content["model"] = {k: v + 1 for k, v in content["model"].items()}
        return content

    monkeypatch.setattr(doctor, "load_checkpoint", flipped)
    monkeypatch.setattr("optimization.state.TrainState.load_state_dict", lambda self, content: None)
    argv = [*SMALL, "--data-set", "IMNET", "--data-path", str(tmp_path / "p"), "--batch-size", "2"]
    assert doctor.main([*argv, "--output-dir", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().out.partition("to fix:")[2]
    assert "1 of 16 images can't be read" in said and "b/2.png" in said
    assert "read back otherwise than written" in said
