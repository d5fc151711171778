"""Going on from a checkpoint: exactly, from the right place, into the right folder."""

import logging
import re
import shlex
import shutil
from pathlib import Path

import pytest
from runs import (
    STOPPED,
    arguments,
    assert_same_state,
    logged,
    newest,
    stopped_after,
    train,
)

import datasets
import main
from checkpointing.files import load_checkpoint, save_checkpoint
from checkpointing.folder import checkpoints_in
from config import load
from errors import CheckpointError, OptionError
from optimization.state import Progress
from training.resume import (
    Start,
    find_start,
    open_folder,
    output_folder,
    refuse_other_options,
    start_at,
)

CASES = {
    "deit recipe": (),
    "sgd, plateau, balanced": (
        *("--opt", "sgd", "--sched", "plateau", "--patience-epochs", "0", "--no-repeated-aug"),
        *("--sampler", "balanced", "--no-model-ema"),
    ),
    "accumulation, onecycle": (
        *("--batch-size", "1", "--accum-steps", "4", "--sched", "onecycle", "--drop", "0.2"),
    ),
    "bf16, lamb, clip": ("--amp", "bf16", "--opt", "lamb", "--clip-grad", "1", "--resplit"),
    "fp16 scaler": ("--amp", "fp16", "--ThreeAugment", "--mixup-mode", "elem"),
    "augmented one by one": ("--augment-on", "cpu"),
    "without a cache": ("--cache", "none", "--train-interpolation", "random"),
    "cosub, multistep": (
        *("--cosub", "--smoothing", "0", "--sched", "multistep", "--decay-milestones", "1", "2"),
    ),
    "batch norm, layer decay": (
        *("--model", "resnet10t", "--input-size", "32", "--sched", "cosine-restarts"),
        *("--layer-decay", "0.8", "--unfreeze-at", "1:*", "--freeze", "layer1.*"),
    ),
}


# --- exactness ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def undisturbed(request, images, tmp_path_factory) -> tuple[tuple[str, ...], Path]:
    """The options and the folder of a whole run."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(images, folder, *request.param) == 0
    return request.param, folder


@pytest.mark.parametrize("updates", [4, 9])
def test_resume_in_mid_epoch_is_exact(images, tmp_path, monkeypatch, undisturbed, updates):
    options, whole = undisturbed
    with stopped_after(updates):
        assert train(images, tmp_path / "parts", *options) == STOPPED
    assert checkpoints_in(tmp_path / "parts")[0].name.count("-") == 2  # within an epoch
    # Not even the saved generators are needed: what a step draws is a function of its place.
    monkeypatch.setattr("utils.set_rng_state", lambda state: None)
    assert train(images, tmp_path / "parts", *options, "--resume", "auto") == 0
    assert_same_state(newest(whole), newest(tmp_path / "parts"))
    assert logged(whole) == logged(tmp_path / "parts")


def test_resume_at_an_epoch_with_another_worker_count_is_exact(images, tmp_path):
    assert train(images, tmp_path / "whole", "--num-workers", "1") == 0
    assert train(images, tmp_path / "parts", "--stop-at-epoch", "2") == 0
    assert len(logged(tmp_path / "parts")) == 2
    resume = ("--resume", "auto", "--num-workers", "2")
    assert train(images, tmp_path / "parts", *resume) == 0
    assert_same_state(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def test_the_command_that_a_stopped_run_prints_goes_on_with_its_options(images, tmp_path, capsys):
    """--resume FILE alone takes all options from the checkpoint."""
    assert train(images, tmp_path / "whole") == 0
    capsys.readouterr()
    assert train(images, tmp_path / "parts", "--stop-at-epoch", "1") == 0
    (command,) = re.findall(r"^next +python main\.py (.*)$", capsys.readouterr().out, re.M)
    assert shlex.split(command) == ["--resume", str(tmp_path / "parts" / "checkpoint-0001.pth")]
    assert main.main(shlex.split(command)) == 0
    assert_same_state(newest(tmp_path / "whole"), newest(tmp_path / "parts"))


def test_damaged_newest_checkpoint_is_passed_over(images, tmp_path, capsys):
    assert train(images, tmp_path / "whole") == 0
    assert train(images, tmp_path / "parts", "--stop-at-epoch", "2") == 0
    damaged = tmp_path / "parts" / "checkpoint-0002.pth"
    content = bytearray(damaged.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 256)  # more than the padding of tensors
    content[middle] = bytes(byte ^ 1 for byte in content[middle])
    damaged.write_bytes(content)
    assert train(images, tmp_path / "parts", "--resume", "auto") == 0
    assert "checkpoint-0002.pth is damaged" in capsys.readouterr().out
    assert_same_state(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


@pytest.fixture
def opened(monkeypatch) -> list[int]:
    """The training images that are opened, in order, by runs with --data-set noted."""
    numbers: list[int] = []

    class Noted(datasets.ArraySource):
        def open(self, index):
            numbers.append(index)
            return super().open(index)

    def noted(is_train, options, seed):
        import numpy as np

        count = 24 if is_train else 4
        pixels = np.random.default_rng(0).integers(0, 255, (count, 8, 8), dtype=np.uint8)
        kind = Noted if is_train else datasets.ArraySource
        return kind(pixels, [0, 1] * (count // 2), ["even", "odd"], "noted")

    datasets.register_dataset("noted")(noted)
    return numbers


@pytest.mark.parametrize("repeated", ["--repeated-aug", "--no-repeated-aug"])
def test_resume_with_another_batch_size_sees_the_same_images(tmp_path, opened, repeated):
    options = ("--data-set", "noted", "--cache", "none", "--epochs", "2", repeated)
    assert train("", tmp_path / "whole", *options) == 0
    whole = opened.copy()
    opened.clear()
    with stopped_after(8):  # two batches of four into the second epoch
        assert train("", tmp_path / "parts", *options) == STOPPED
    assert opened == whole[:32]
    resume = ("--resume", "auto", "--batch-size", "8")
    assert train("", tmp_path / "parts", *options, *resume) == 0
    assert opened == whole
    if repeated == "--no-repeated-aug":
        assert sorted(opened[24:]) == list(range(24))
    progress = newest(tmp_path / "parts")["progress"]
    # Three updates per epoch with batches of 8.
    assert progress["epoch"] == 2 and progress["update"] == 6


# --- what is said, what is refused --------------------------------------------------------------


def test_resume_says_what_changed(images, tmp_path, capsys):
    assert train(images, tmp_path, "--stop-at-epoch", "1") == 0
    assert train(images, tmp_path, "--resume", "auto", "--lr", "0.02", "--stop-at-epoch", "2") == 0
    assert "--lr is 0.02 now, was 0.01" in capsys.readouterr().out


def test_resume_with_another_optimiser_is_an_error(images, tmp_path, capsys):
    assert train(images, tmp_path, "--stop-at-epoch", "1") == 0
    for opt in ("sgd", "lamb", "adam"):
        assert train(images, tmp_path, "--resume", "auto", "--opt", opt) == 2
        assert "written with --opt adamw" in capsys.readouterr().err


def test_resume_of_another_model_or_class_count_is_an_error(images, tmp_path, capsys):
    assert train(images, tmp_path, "--stop-at-epoch", "1") == 0
    assert train(images, tmp_path, "--resume", "auto", "--model", "modern_lenet") == 2
    assert "written with --model deit_nano_patch4_32" in capsys.readouterr().err
    assert train(images, tmp_path, "--resume", "auto", "--data-set", "DIGITS") == 2
    assert "other classes (gone: amber, blue, crimson; new: 0, 1, 2, …)" in capsys.readouterr().err


def test_resume_does_not_need_the_weights_it_started_from(images, tmp_path):
    assert train(images, tmp_path / "start", "--stop-at-epoch", "1") == 0
    weights = tmp_path / "weights.pth"
    weights.write_bytes((tmp_path / "start" / "best.pth").read_bytes())
    fine = ("--finetune", str(weights))
    assert train(images, tmp_path / "fine", *fine, "--stop-at-epoch", "1") == 0
    weights.unlink()
    assert train(images, tmp_path / "fine", *fine, "--resume", "auto") == 0


# --- the folder ---------------------------------------------------------------------------------


def test_resume_keeps_the_best_score(images, tmp_path):
    assert train(images, tmp_path, "--stop-at-epoch", "2") == 0
    before = newest(tmp_path)["progress"]
    assert train(images, tmp_path, "--resume", "auto") == 0
    after = newest(tmp_path)["progress"]
    assert after["best"] >= before["best"] > 0
    best = max(r["test_acc1"] for r in logged(tmp_path))
    assert after["best"] == best
    assert load_checkpoint(tmp_path / "best.pth")["metrics"]["test_acc1"] == best


def test_going_back_puts_the_abandoned_future_aside(images, tmp_path, capsys):
    assert train(images, tmp_path, "--keep", "9", "--best-metric", "train_loss") == 0
    start = str(tmp_path / "checkpoint-0001.pth")
    capsys.readouterr()
    assert main.main(["--resume", start, "--epochs", "2", "--warmup-epochs", "0"]) == 0
    assert "3 newer checkpoints were put into" in capsys.readouterr().out
    aside = {p.name for p in (tmp_path / "set-aside").iterdir()}
    assert aside == {"checkpoint-0002.pth", "checkpoint-0003.pth", "best.pth"}
    names = [p.name for p in checkpoints_in(tmp_path)]
    assert names == ["checkpoint-0002.pth", "checkpoint-0001.pth"]
    assert [r["epoch"] for r in logged(tmp_path)] == [1, 2]
    assert load_checkpoint(tmp_path / "best.pth")["progress"]["epoch"] <= 2


def test_going_back_keeps_a_best_of_the_past(images, tmp_path):
    """No training, so that the first epoch stays the best."""
    options = ("--lr", "0", "--warmup-lr", "0", "--min-lr", "0", "--keep", "9")
    assert train(images, tmp_path, *options) == 0
    best = (tmp_path / "best.pth").read_bytes()
    assert load_checkpoint(tmp_path / "best.pth")["progress"]["epoch"] == 1
    assert main.main(["--resume", str(tmp_path / "checkpoint-0002.pth")]) == 0
    assert {p.name for p in (tmp_path / "set-aside").iterdir()} == {"checkpoint-0003.pth"}
    assert (tmp_path / "best.pth").read_bytes() == best


def test_a_best_that_a_crash_left_unnamed_is_named_on_resume(images, tmp_path):
    """The process may die between writing a checkpoint and linking best.pth to it."""
    assert train(images, tmp_path, "--best-metric", "train_loss", "--stop-at-epoch", "2") == 0
    assert newest(tmp_path)["progress"]["best_epoch"] == 2
    (tmp_path / "best.pth").unlink()
    # Nothing after the resume is better, so best.pth is the checkpoint resumed from.
    options = ("--best-metric", "train_loss", "--lr", "10", "--warmup-epochs", "0")
    assert train(images, tmp_path, *options, "--resume", "auto") == 0
    assert newest(tmp_path)["progress"]["best_epoch"] == 2
    assert load_checkpoint(tmp_path / "best.pth")["progress"]["epoch"] == 2


def test_best_weights_that_were_never_written_are_no_score_to_beat(images, tmp_path, capsys):
    """There was no room for those of epoch 2, and the process died: best.pth is of epoch 1."""
    options = ("--best-metric", "train_loss", "--keep", "9")
    with stopped_after(14):
        assert train(images, tmp_path, *options) == STOPPED
    path = checkpoints_in(tmp_path)[0]
    content = load_checkpoint(path)
    content["progress"] |= {"best": 0.0, "best_epoch": 2, "reference": 0.0}
    save_checkpoint(path, content)
    (tmp_path / "checkpoint-0002.pth").unlink()
    shutil.copy(tmp_path / "checkpoint-0001.pth", tmp_path / "best.pth")
    assert train(images, tmp_path, *options, "--resume", "auto") == 0
    first, _, third = logged(tmp_path)
    beaten = f"to be beaten is train_loss {first['train_loss']:.4f} of epoch 1"
    assert beaten in capsys.readouterr().out
    progress = newest(tmp_path)["progress"]
    assert third["train_loss"] < first["train_loss"]
    assert (progress["best"], progress["best_epoch"]) == (third["train_loss"], 3)
    assert load_checkpoint(tmp_path / "best.pth")["progress"]["epoch"] == 3


def test_resume_into_the_folder_of_another_run_is_refused(images, tmp_path, capsys):
    assert train(images, tmp_path / "a", "--stop-at-epoch", "1") == 0
    assert train(images, tmp_path / "b", "--stop-at-epoch", "1") == 0
    before = (tmp_path / "b" / "log.txt").read_bytes()
    start = str(tmp_path / "a" / "checkpoint-0001.pth")
    assert main.main(["--resume", start, "--output-dir", str(tmp_path / "b")]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "b" / "log.txt").read_bytes() == before


def test_a_directory_that_holds_a_run_is_refused(images, tmp_path, capsys):
    assert train(images, tmp_path, "--stop-at-epoch", "1") == 0
    before = (tmp_path / "log.txt").read_bytes()
    assert train(images, tmp_path) == 2
    error = capsys.readouterr().err
    assert "--resume auto" in error and "--output-dir" in error
    assert (tmp_path / "log.txt").read_bytes() == before


def test_a_run_in_a_new_folder_is_locked_until_released(tmp_path):
    folder = tmp_path / "deep" / "run"
    config = load(arguments("", folder))
    lock = open_folder(config, folder)
    assert [p.name for p in folder.iterdir()] == ["run.lock"]
    with pytest.raises(OptionError, match="in use by process"):
        open_folder(config, folder)
    lock.release()
    open_folder(config, folder).release()


def test_the_default_folder_is_named_after_model_and_data_set():
    config = load(["--model", "deit_small", "--data-set", "hfds/user/flowers"])
    assert output_folder(config) == Path("output/deit_small-hfds-user-flowers")
    assert output_folder(load(["--output-dir", "~/runs"])) == Path.home() / "runs"


# --- where to start -----------------------------------------------------------------------------


def content(epoch: int, samples: int = 0) -> dict:
    return {"progress": {"epoch": epoch, "samples": samples}}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Checkpoints after one epoch, after two, and after 8 images of the third."""
    save_checkpoint(tmp_path / "checkpoint-0001.pth", content(1))
    save_checkpoint(tmp_path / "checkpoint-0002.pth", content(2))
    save_checkpoint(tmp_path / "checkpoint-0002-00000008.pth", content(2, 8))
    return tmp_path


def test_a_run_without_resume_starts_anew(folder):
    assert find_start(load(arguments("", folder)), folder) is None


def test_auto_finds_the_newest_that_can_be_read(folder, caplog):
    config = load(arguments("", folder, "--resume", "auto"))
    newest_path = folder / "checkpoint-0002-00000008.pth"
    assert find_start(config, folder) == (str(newest_path), content(2, 8))
    newest_path.write_bytes(b"cut off")
    assert find_start(config, folder) == (str(folder / "checkpoint-0002.pth"), content(2))
    assert newest_path.name in caplog.text
    for path in folder.glob("*.pth"):
        path.write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        find_start(config, folder)


def test_auto_in_an_empty_folder_starts_anew(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert find_start(load(arguments("", tmp_path, "--resume", "auto")), tmp_path) is None
    assert f"nothing to resume in {tmp_path}" in caplog.text


def test_a_named_checkpoint_is_taken_though_there_are_newer_ones(folder):
    named = str(folder / "checkpoint-0001.pth")
    config = load(arguments("", folder, "--resume", named))
    assert find_start(config, folder) == (named, content(1))


def test_start_at_counts_from_the_beginning_of_an_epoch():
    progress = Progress(
        epoch=4,
        step=3,
        samples=12,
        update=27,
        best=80.0,
        best_epoch=2,
        reference=79.0,
        improved_epoch=2,
        loss_sum=3.0,
        loss_count=3,
        recent_sum=1.0,
        recent_count=1,
    )
    start_at(progress, 2, 6)
    assert (progress.epoch, progress.update) == (2, 12)
    assert progress.step == progress.samples == progress.loss_count == progress.recent_count == 0
    assert progress.loss_sum == progress.recent_sum == 0.0
    # The best score, of the second epoch, is of the past.
    assert (progress.best, progress.reference) == (80.0, 79.0)


def test_start_at_forgets_a_best_score_of_the_future():
    progress = Progress(epoch=4, update=24, best=80.0, best_epoch=3, reference=79.0)
    start_at(progress, 2, 6)
    assert progress.best is None and progress.reference is None


def test_start_epoch_of_a_run_sets_schedule_and_log(images, tmp_path):
    """The rates and the log of the third epoch, from new weights."""
    assert train(images, tmp_path / "whole") == 0
    assert train(images, tmp_path / "last", "--start-epoch", "2") == 0
    (record,) = logged(tmp_path / "last")
    expected = logged(tmp_path / "whole")[2]
    for key in ("epoch", "train_lr", "update"):
        assert record[key] == expected[key], key


@pytest.mark.parametrize("name", ["opt", "model"])
def test_a_name_in_a_checkpoint_that_is_a_number(name):
    with pytest.raises(OptionError, match=f"--{name}: x.pth was written with --{name} 5"):
        refuse_other_options(load([]), Start("x.pth", {"config": {name: 5}}))
