"""tools.doctor: what it checks and finds, on a small CNN and real digits."""

import re
import shutil

import pytest
import torch
from before_training import SMALL
from tiny_images import image_folder

import config
from checkpointing.files import load_checkpoint
from distributed.processes import Processes
from tools import doctor


def test_doctor_is_ready_and_leaves_nothing_behind(tmp_path, capsys):
    folder = tmp_path / "runs" / "one"
    assert doctor.main([*SMALL, "--output-dir", str(folder), "--batch-size", "16"]) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(r"ready: about \d+ s", said.splitlines()[-1])
    assert "skipped" not in said and "to fix" not in said
    for name in doctor.CHECKS:
        assert re.search(rf"^{name} +ok ", said, re.M)
    assert "train: 1438 images, 10 classes" in said and "89 steps per epoch" in said
    assert list(tmp_path.iterdir()) == []


def time_of(argv, capsys) -> str:
    """The lines of the check of time, of a doctor that is ready."""
    assert doctor.main(argv) == 0
    said = capsys.readouterr().out
    return re.search(r"^time +ok +(.*)^ready: about ", said, re.M | re.S)[1]


def test_doctor_says_what_decoding_costs_and_what_would_spare_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.outlook.WORTH_SAYING", 0)
    monkeypatch.setattr("training.outlook.LARGE", 0)
    monkeypatch.setattr(doctor, "MANY", 14)
    photos = image_folder(tmp_path / "p", {"train": 5, "val": 2}, classes=("a", "b"))
    argv = [*SMALL, "--data-set", "IMNET", "--data-path", str(photos), "--batch-size", "4"]
    assert doctor.main([*argv, "--cache", "none", "--output-dir", str(tmp_path / "o")]) == 0
    said = capsys.readouterr().out
    assert re.search(r" found in \S+ s, [\d,]+ images/s; once on each machine$", said, re.M)
    [(ms, rate)] = re.findall(
        r"^decoding +ok +(\S+) ms for .* image, ([\d,]+) images/s", said, re.M
    )
    assert float(rate.replace(",", "")) == pytest.approx(1000 / float(ms), rel=0.06)
    assert f"decoding takes about {ms} ms each" in said and "python -m tools.data pack" in said


def test_doctor_gives_a_time_where_an_epoch_is_one_update(tmp_path, capsys):
    image_folder(tmp_path / "p", {"train": 5, "val": 2}, classes=("a", "b"))
    argv = [*SMALL, "--data-set", "IMNET", "--data-path", str(tmp_path / "p"), "--batch-size", "8"]
    said = time_of([*argv, "--output-dir", str(tmp_path / "o")], capsys)
    assert re.match(r"about \d+ s for 2 epochs in one process; an epoch: training \d+ s, ", said)


def test_doctor_finds_the_batch_as_a_run_does(tmp_path, capsys):
    image_folder(tmp_path / "p", {"train": 5, "val": 2}, classes=("a", "b"))
    argv = [*SMALL, "--data-set", "IMNET", "--data-path", str(tmp_path / "p")]
    argv += ["--batch-size", "auto", "--output-dir", str(tmp_path / "o")]
    assert doctor.main(argv) == 0
    said = capsys.readouterr().out
    # Four updates at least of ten images: the largest power of two is two.
    assert "5 steps per epoch" in said and "ready: about " in said
    assert not (tmp_path / "o").exists()


def test_doctor_measures_with_fewer_images_where_updates_take_long(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tools.common.timing.SLOW", 1e-9)
    monkeypatch.setattr(doctor, "LONG", -1)
    argv = [*SMALL, "--output-dir", str(tmp_path / "o"), "--batch-size", "16", "--accum-steps", "3"]
    assert doctor.main(argv) == 0
    said = capsys.readouterr().out
    assert "scaled from 2 images, not 48, at a time" in said
    assert "in this process with 2 images, not 16, at a time" in said
    assert re.search(r"shorter by: a GPU; .*fewer --epochs than 2; ", said)
    # Of 1438 images 29 updates of 48, each 24 times what was measured.
    [update] = re.findall(r"(\S+) s per update", said)
    [epoch] = re.findall(r"an epoch: training (\d+) s", said)
    assert float(epoch) == pytest.approx(30 * float(update), abs=2)


def test_doctor_says_that_images_are_few_and_counts_all_that_is_freed(tmp_path, capsys):
    image_folder(tmp_path / "p", {"train": 5, "val": 2}, classes=("a", "b"))
    argv = ["--model", "test_resnet", "--data-path", str(tmp_path / "p"), "--batch-size", "4"]
    argv += ["--input-size", "96", "--num-workers", "0", "--device", "cpu", "--epochs", "2"]
    argv += ["--freeze", "*", "--unfreeze-at", "0:fc", "1:*", "--output-dir", str(tmp_path / "o")]
    said = time_of(argv, capsys)
    assert "as if all that --unfreeze-at frees were trained from the start" in said
    assert "warning: 10 images are few to train test_resnet from scratch" in said
    assert "configs/finetune_frozen.yaml --model test_resnet --input-size 160" in said


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


def test_doctor_says_once_what_is_odd_in_both_parts(tmp_path):
    image_folder(tmp_path, {"set": 4}, classes=("bus", "train"))
    options = config.load(["--data-path", str(tmp_path / "set"), "--val-fraction", "0.5"])
    run = doctor.PlannedRun(options, Processes(), torch.device("cpu"), tmp_path)
    lines = [line for line in doctor.check_data(run) if line.startswith("warning: ")]
    assert len(lines) == 1 and "train counts as a class" in lines[0]


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
