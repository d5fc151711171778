"""What a run survives, or ends with a clear line: folders that vanish, strange names, no memory."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import checkpoint
import main
import trainer
from tools import torture

BASE = (
    *("--model", "deit_nano_patch4_32", "--input-size", "8", "--device", "cpu", "--epochs", "3"),
    *("--warmup-epochs", "1", "--batch-size", "4", "--num-workers", "0", "--no-tensorboard"),
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    torture.make_pictures(root)
    return root


def test_a_folder_that_vanishes_is_made_anew(pictures, tmp_path, monkeypatch, capsys):
    """What was in it is lost; the checkpoint to come and the whole log are written."""
    folder = tmp_path / "run"
    original = trainer.Trainer._finish_epoch

    def finish(self, watch):
        if self.state.progress.epoch == 1:
            self.writer.wait()
            shutil.rmtree(folder)
        original(self, watch)

    monkeypatch.setattr(trainer.Trainer, "_finish_epoch", finish)
    assert main.main([*BASE, "--data-path", str(pictures), "--output-dir", str(folder)]) == 0
    lines = (folder / "log.txt").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2]
    assert checkpoint.load_latest(folder)[1]["progress"]["epoch"] == 3


def test_a_log_that_cannot_be_written_is_a_warning(pictures, tmp_path, monkeypatch, capsys):
    """A folder takes the file's place for an epoch; the next one writes what is missing."""
    folder = tmp_path / "run"
    original = trainer.Trainer._finish_epoch

    def finish(self, watch):
        path = folder / "log.txt"
        if self.state.progress.epoch == 1:
            path.unlink()
            path.mkdir()
        original(self, watch)
        if self.state.progress.epoch == 2:
            path.rmdir()

    monkeypatch.setattr(trainer.Trainer, "_finish_epoch", finish)
    assert main.main([*BASE, "--data-path", str(pictures), "--output-dir", str(folder)]) == 0
    assert "can't be written" in capsys.readouterr().out
    lines = (folder / "log.txt").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2]


NAMES = (
    "$(touch pwned).png", "; touch pwned;.png", "`touch pwned`.png", "a\nb.png", "\x1b[2Jx.png",
    "x..\\..\\x.png", "-rf.png",
)  # fmt: skip


def test_names_of_pictures_never_run_or_leave_the_folder(pictures, tmp_path, monkeypatch, capsys):
    """Names with a shell's and a terminal's commands, of pictures that can't be read."""
    root, folder = tmp_path / "pictures", tmp_path / "run"
    shutil.copytree(pictures, root)
    strange = root / "train" / "$(touch pwned)"
    strange.mkdir()
    (root / "val" / "$(touch pwned)").mkdir()
    for part in ("train", "val"):
        for i in range(8):
            image = Image.new("RGB", (12, 12), (20 * i, 0, 0))
            image.save(root / part / "$(touch pwned)" / f"{i}.png")
    for name in NAMES:
        (strange / name).write_bytes(b"not a picture")
    monkeypatch.chdir(tmp_path)
    before = {p for p in tmp_path.rglob("*") if folder not in (p, *p.parents)}
    argv = [*BASE, "--data-path", str(root), "--output-dir", str(folder), "--on-bad-image", "skip"]
    argv += ["--no-repeated-aug", "--epochs", "2", "--batch-size", "3"]
    assert main.main(argv) == 0
    output = capsys.readouterr().out
    assert "\x1b[2J" not in output
    listed = (folder / "bad_images.txt").read_text().splitlines()
    assert all("not a picture" in line for line in listed)
    assert len(listed) == len(NAMES), "\n".join(listed)
    after = {p for p in tmp_path.rglob("*") if folder not in (p, *p.parents)}
    assert after == before
    assert not list(folder.rglob("*pwned*"))


HUNGRY = """
import timm
import torch
from torch import nn

class Hungry(nn.Module):
    def forward(self, x):
        torch.empty(1 << 50 if len(x) > 3 else 1)
        return x

@timm.models.register_model
def hungry(pretrained=False, num_classes=2, **kwargs):
    return nn.Sequential(Hungry(), nn.Flatten(), nn.Linear(192, num_classes))
"""


def test_too_little_memory_says_batch_size_and_what_helps(pictures, tmp_path, capsys):
    """A real refusal, by the host's allocator."""
    plugin = tmp_path / "hungry.py"
    plugin.write_text(HUNGRY)
    options = ("--plugin", str(plugin), "--model", "hungry", "--accum-steps", "2")
    argv = [*BASE, "--data-path", str(pictures), "--output-dir", str(tmp_path / "run"), *options]
    assert main.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory on cpu with --batch-size 4")
    assert "--batch-size 2 --accum-steps 4" in error and "--grad-checkpointing" in error
    assert "--amp bf16" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run" / "run.lock").exists()


def test_automatic_batch_is_the_largest_that_fits(pictures, tmp_path, capsys):
    """Four pictures are too many for the host's allocator; the update keeps its twelve."""
    plugin = tmp_path / "hungry.py"
    plugin.write_text(HUNGRY)
    options = ("--plugin", str(plugin), "--model", "hungry", "--batch-size", "auto")
    options += ("--effective-batch", "12", "--no-repeated-aug", "--eval-batch-size", "2")
    argv = [*BASE, "--data-path", str(pictures), "--output-dir", str(tmp_path / "run"), *options]
    assert main.main(argv) == 0
    output = capsys.readouterr().out
    assert "12 = 3 × 1 process(es) × 4 accumulated" in output
    found = checkpoint.load_latest(tmp_path / "run")[1]
    assert found["config"]["batch_size"] == 3 and found["config"]["accum_steps"] == 4
    by_hand = ("--plugin", str(plugin), "--model", "hungry", *options[6:])
    argv = [*BASE, "--data-path", str(pictures), "--output-dir", str(tmp_path / "hand"), *by_hand]
    assert main.main([*argv, "--batch-size", "3", "--accum-steps", "4"]) == 0
    expected = checkpoint.load_latest(tmp_path / "hand")[1]
    for part in ("model", "optimizer", "progress"):
        assert torture._count(found[part], expected[part]) == 0, part


def test_automatic_batch_steps_down_when_memory_ends_later(pictures, tmp_path, capsys):
    """After an epoch six pictures are too many: the run goes on from its checkpoint with four."""
    plugin = tmp_path / "hungry.py"
    later = "len(x) > 5 and self.training and self.seen > 4"
    plugin.write_text(
        HUNGRY.replace("len(x) > 3", later).replace(
            "        torch.empty",
            "        self.seen = getattr(self, 'seen', 0) + 1\n        torch.empty",
        )
    )
    options = ("--plugin", str(plugin), "--model", "hungry", "--batch-size", "auto")
    options += ("--effective-batch", "12", "--no-repeated-aug", "--save-every-steps", "1")
    options += ("--no-model-ema",)
    argv = [*BASE, "--data-path", str(pictures), "--output-dir", str(tmp_path / "run"), *options]
    assert main.main(argv) == 0
    output = capsys.readouterr().out
    assert "12 = 12 × 1" in output and "resumed" in output and "12 = 4 × 1" in output
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2]
