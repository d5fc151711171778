"""What a run writes into its folder, when, and what it does where that fails."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import (
    CLASSES,
    STOPPED,
    assert_same_state,
    at_update,
    logged,
    newest,
    train,
)

import main
from checkpointing.files import load_checkpoint, save_checkpoint
from checkpointing.folder import ON_SIGNAL, checkpoints_in, set_best
from inference import load_for_inference
from loggers import RunLogger


def test_checkpoints_within_an_epoch(images, tmp_path):
    """Every second update and at each epoch; a run that dies later goes on from the newest."""
    assert train(images, tmp_path / "whole", "--save-every-steps", "2", "--keep", "99") == 0
    names = [p.name for p in checkpoints_in(tmp_path / "whole")][::-1]
    within = [f"checkpoint-{e:04d}-{n:08d}.pth" for e in range(3) for n in (8, 16, 24)]
    assert [n for n in names if n.count("-") == 2] == within
    for die_at in ("checkpoint-0000-00000016.pth", "checkpoint-0002-00000008.pth"):
        folder = tmp_path / die_at
        folder.mkdir()
        for name in names[: names.index(die_at) + 1]:
            (folder / name).write_bytes((tmp_path / "whole" / name).read_bytes())
        (folder / "log.txt").write_bytes((tmp_path / "whole" / "log.txt").read_bytes())
        if "checkpoint-0001.pth" in names[: names.index(die_at)]:  # the best of this run
            set_best(folder, folder / "checkpoint-0001.pth")
        assert train(images, folder, "--resume", "auto", "--save-every-steps", "2") == 0
        assert_same_state(newest(tmp_path / "whole"), newest(folder))
        assert logged(tmp_path / "whole") == logged(folder)


def test_a_checkpoint_of_a_signal_stays_where_it_is_written_again(images, tmp_path, monkeypatch):
    """By a run that goes on from it with another option and is stopped before its first update.

    It goes with the next one still; one of an epoch's end stays what it is.
    """

    def signal_at_once(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    folder = tmp_path / "run"
    with at_update(2, lambda: signal.raise_signal(signal.SIGTERM)):
        assert train(images, folder) == STOPPED
    [path] = checkpoints_in(folder)
    monkeypatch.chdir(folder)
    for lr, on_signal in ((0.02, True), (0.03, False)):
        with monkeypatch.context() as patched:
            patched.setattr(RunLogger, "start_epoch", signal_at_once)
            assert train(images, folder, "--resume", path.name, "--lr", str(lr)) == STOPPED
        assert checkpoints_in(folder) == [path]
        content = load_checkpoint(path)
        assert (content["config"]["lr"], content[ON_SIGNAL]) == (lr, on_signal)
        assert train(images, folder, "--resume", "auto", "--stop-at-epoch", "1") == 0
        [path] = checkpoints_in(folder)


def test_saving_by_the_clock(images, tmp_path):
    """An interval that is shorter than a step saves after every update."""
    options = ("--save-every-minutes", "1e-9", "--keep", "99", "--epochs", "1")
    assert train(images, tmp_path, *options, "--warmup-epochs", "0") == 0
    names = [p.name for p in checkpoints_in(tmp_path)][::-1]
    within = [f"checkpoint-0000-{n:08d}.pth" for n in (4, 8, 12, 16, 20, 24)]
    assert names == [*within, "checkpoint-0001.pth"]


def test_keep_and_save_every(images, tmp_path):
    assert train(images, tmp_path / "one", "--keep", "1", "--best-metric", "train_loss") == 0
    names = {p.name for p in (tmp_path / "one").glob("*.pth")}
    assert names == {"checkpoint-0003.pth", "best.pth"}
    # Nothing learns at a rate of zero: the first epoch is the best, and the last is always saved.
    still = ("--lr", "0", "--warmup-lr", "0", "--min-lr", "0", "--epochs", "4", "--keep", "9")
    assert train(images, tmp_path / "some", *still, "--save-every", "3") == 0
    names = [p.name for p in checkpoints_in(tmp_path / "some")][::-1]
    assert names == [f"checkpoint-000{epoch}.pth" for epoch in (1, 3, 4)]


def test_checkpoint_is_plain_and_self_sufficient(images, tmp_path, capsys):
    assert train(images, tmp_path) == 0
    content = torch.load(tmp_path / "best.pth", weights_only=True)
    assert content["class_names"] == list(CLASSES)
    assert content["config"]["model"] == "deit_nano_patch4_32"
    capsys.readouterr()
    assert main.main(["--eval", "--resume", str(tmp_path / "best.pth")]) == 0
    shown = capsys.readouterr().out
    metrics = content["metrics"]
    assert f"model  top-1 {metrics['test_acc1']:.3f} %" in shown
    assert f"EMA    top-1 {metrics['ema_acc1']:.3f} %" in shown
    assert f"loss {metrics['test_loss']:.4f}" in shown
    assert (tmp_path / "eval_model_per_class.csv").exists()

    model, transform, class_names = load_for_inference(tmp_path / "best.pth")
    right = total = 0
    for label, name in enumerate(class_names):
        for path in (images / "val" / name).iterdir():
            with torch.no_grad():
                logits = model(transform(Image.open(path).convert("RGB"))[None])
            right += int(logits.argmax()) == label
            total += 1
    assert total == 8
    assert 100 * right / total == pytest.approx(metrics["test_acc1"])


def test_saved_config_reproduces_the_run(images, tmp_path):
    options = ("--opt", "sgd", "--mixup", "0.3", "--aa", "none", "--freeze", "blocks.0.*")
    assert train(images, tmp_path / "a", *options, "--epochs", "2") == 0
    config, again = str(tmp_path / "a" / "config.yaml"), str(tmp_path / "b")
    assert main.main(["--config", config, "--output-dir", again]) == 0
    assert_same_state(newest(tmp_path / "a"), newest(tmp_path / "b"))


# --- where it fails -----------------------------------------------------------------------------


def test_output_directory_that_cannot_be_written(images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train(images, tmp_path / "file" / "run") == 2
    assert "--output-dir" in capsys.readouterr().err


def test_full_disk_is_a_warning_and_at_the_end_an_error(images, tmp_path, capsys, monkeypatch):
    failing = {"checkpoint-0002.pth"}

    def save(path: Path, content: dict) -> None:
        if path.name in failing:
            raise OSError(28, "No space left on device")
        save_checkpoint(path, content)

    monkeypatch.setattr("checkpointing.writer.save_checkpoint", save)
    assert train(images, tmp_path / "a") == 0
    assert "No space left" in capsys.readouterr().out
    failing.add("checkpoint-0003.pth")
    assert train(images, tmp_path / "b") == 1
    assert checkpoints_in(tmp_path / "b")[0].name == "checkpoint-0001.pth"


def test_a_folder_that_vanishes_is_made_anew(images, tmp_path):
    """What was in it is lost; the checkpoint to come and the whole log are written."""
    folder = tmp_path / "run"

    def vanish() -> None:
        """In the last update of the second epoch, when all of the first is on disk."""
        deadline = time.monotonic() + 20
        while not (folder / "best.pth").exists() or list(folder.glob(".*.tmp*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
        shutil.rmtree(folder)

    with at_update(12, vanish):
        assert train(images, folder, "--keep", "9") == 0
    lines = (folder / "log.txt").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    assert not (folder / "checkpoint-0001.pth").exists()
    assert newest(folder)["progress"]["epoch"] == 3


def test_a_log_that_cannot_be_written_is_a_warning(images, tmp_path, capsys):
    """A folder takes the file's place for an epoch; the next one writes what is missing."""
    path = tmp_path / "run" / "log.txt"

    def block() -> None:
        path.unlink()
        path.mkdir()

    with at_update(12, block), at_update(18, path.rmdir):
        assert train(images, tmp_path / "run") == 0
    assert capsys.readouterr().out.count("warning: not written") == 1
    lines = path.read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
