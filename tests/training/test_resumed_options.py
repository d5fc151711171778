"""What a resumed run remembers, and what an option that changed takes with it."""

import json
import shutil

import pytest
import torch
from runs import PLAIN, STOPPED, logged, newest, stopped_after, train

from checkpointing.files import load_checkpoint
from config import load
from datasets import build_dataset
from tools import inspect


@pytest.fixture
def flat(images, tmp_path):
    """The images fixture's classes without a validation part."""
    folder = tmp_path / "flat"
    shutil.copytree(images / "train", folder)
    return folder


HELD_OUT = ("--val-fraction", "0.25", "--keep", "9")


def parts(flat, content, seed=0):
    """The names of the images that a run trains and validates on, by its checkpoint."""
    options = load(["--data-path", str(flat), *HELD_OUT]).data
    found = []
    for is_train in (True, False):
        part = build_dataset(is_train, options, seed=seed, held_out=content["split"]["held_out"])
        found.append({part.source.identity(i) for i in range(len(part))})
    return found


def test_another_seed_validates_on_the_same_images(flat, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(flat, folder, *HELD_OUT, "--stop-at-epoch", "1") == 0
    first = newest(folder)
    (trained, held_out) = parts(flat, first)
    assert len(held_out) == 6 and not trained & held_out
    for seed, epoch in (("5", "2"), ("7", "3")):
        more = ("--seed", seed, "--resume", "auto", "--stop-at-epoch", epoch)
        assert train(flat, folder, *HELD_OUT, *more) == 0
        assert "held out for validation stay the same" in capsys.readouterr().out
        after = newest(folder)["split"]
        assert after["seed"] == 0
        assert torch.equal(after["held_out"], first["split"]["held_out"])
        assert parts(flat, newest(folder), seed=int(seed)) == [trained, held_out]


def test_images_that_come_and_go_leave_the_split_as_it_was(flat, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(flat, folder, *HELD_OUT, "--stop-at-epoch", "1") == 0
    trained, held_out = parts(flat, newest(folder))
    moved = flat.rename(tmp_path / "moved")
    for name in sorted(trained)[:5]:
        shutil.copy(moved / name, (moved / name).with_name(f"0 new {name.split('/')[1]}"))
    gone = sorted(held_out)[0]
    (moved / gone).unlink()
    assert train(moved, folder, *HELD_OUT, "--resume", "auto") == 0
    out = capsys.readouterr().out
    assert "1 of the 6 images that this run validates on are gone" in out
    assert "23 images to train on now, 18 before" in out
    now_trained, now_held_out = parts(moved, newest(folder))
    assert now_held_out == held_out - {gone}
    assert trained < now_trained and not now_trained & now_held_out


def test_what_may_not_change_is_refused_before_anything_moves(flat, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(flat, folder, *HELD_OUT) == 0
    first = str(folder / "checkpoint-0001.pth")  # two newer ones would be put aside
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    cases = {
        ("--val-fraction", "0.5"): "--val-fraction: ",
        ("--model", "modern_lenet"): "--model: ",
        ("--opt", "lion"): "--opt: ",
        ("--overfit-batches", "1"): "--overfit-batches: ",
        ("--layer-decay", "0.5"): "--layer-decay",
        ("--input-size", "16"): "--input-size",
        (
            "--data-set",
            "DIGITS",
        ): "trained on other classes (gone: amber, blue, crimson; new: 0, 1, 2, …)",
    }
    for more, words in cases.items():
        assert train(flat, folder, *HELD_OUT, "--resume", first, *more) == 2
        error = capsys.readouterr().err
        assert words in error and "--finetune" in error and error.count("\n") == 1
        after = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
        assert {p.name for p in after} == {p.name for p in before}
        for name in ("log.txt", "config.yaml", "best.pth", "checkpoint-0003.pth"):
            assert after[folder / name] == before[folder / name]


def test_none_of_the_images_that_were_held_out(flat, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(flat, folder, *HELD_OUT, "--stop-at-epoch", "1") == 0
    for path in sorted(flat.rglob("*.png")):
        path.rename(path.with_name(f"x{path.name}"))
    assert train(flat, folder, *HELD_OUT, "--resume", "auto") == 2
    assert "--data-path: none of the 6 images" in capsys.readouterr().err


def test_another_metric_starts_from_what_is_there(images, tmp_path, capsys):
    """The training loss falls in each epoch, so the last one is the best by it."""
    keep = ("--keep", "9", "--lr", "0.05")
    assert train(images, tmp_path, *keep, "--stop-at-epoch", "2") == 0
    records = logged(tmp_path)
    assert records[1]["train_loss"] < records[0]["train_loss"]
    more = ("--resume", "auto", "--best-metric", "train_loss")
    assert train(images, tmp_path, *keep, *more) == 0
    assert f"to be beaten: train_loss {records[1]['train_loss']:.4f} of epoch 2" in (
        capsys.readouterr().out
    )
    last = logged(tmp_path)[2]["train_loss"]
    best = min((2, records[1]["train_loss"]), (3, last), key=lambda pair: pair[1])
    progress = newest(tmp_path)["progress"]
    assert (progress["best_epoch"], progress["best"]) == best
    assert load_checkpoint(tmp_path / "best.pth")["metrics"]["train_loss"] == best[1]


def test_a_metric_without_checkpoints_of_its_best_epoch(images, tmp_path):
    """Only what is on disk can be the best; progress is measured by all epochs."""
    still = ("--lr", "0", "--warmup-lr", "0", "--min-lr", "0", "--keep", "1")
    assert train(images, tmp_path, *still, "--stop-at-epoch", "2") == 0
    log = tmp_path / "log.txt"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    records[0]["train_loss"], records[1]["train_loss"] = 0.1, 0.5
    log.write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "best.pth").unlink()
    more = ("--resume", "auto", "--best-metric", "train_loss", "--stop-at-epoch", "3")
    assert train(images, tmp_path, *still, *more) == 0
    progress = newest(tmp_path)["progress"]
    assert (progress["best"], progress["best_epoch"]) == (0.5, 2)
    assert (progress["reference"], progress["improved_epoch"]) == (0.1, 2)
    assert load_checkpoint(tmp_path / "best.pth")["progress"]["epoch"] == 2


@pytest.mark.parametrize("lr", ["0.02", "0.01"])
def test_plateau_takes_a_new_rate_and_keeps_its_own_else(images, tmp_path, lr):
    options = ("--sched", "plateau", "--patience-epochs", "0", "--warmup-epochs", "0")
    options += ("--best-metric", "train_loss", "--unscale-lr", "--decay-rate", "0.5", *PLAIN)
    options += ("--lr", "0.01", "--min-lr", "0.0001", "--weight-decay", "0")
    assert train(images, tmp_path, *options, "--stop-at-epoch", "1") == 0
    path = tmp_path / "checkpoint-0001.pth"
    content = load_checkpoint(path)
    content["schedule"]["plateau"]["lr"] = 0.0025
    content["schedule"]["factor"] = 0.5
    torch.save(content, path)
    more = ("--resume", "auto", "--lr", lr, "--stop-at-epoch", "2")
    assert train(images, tmp_path, *options, *more) == 0
    assert logged(tmp_path)[1]["train_lr"] == (0.02 if lr == "0.02" else 0.00125)


def test_an_average_that_is_switched_on_starts_from_the_weights(images, tmp_path, capsys):
    still = ("--lr", "0", "--warmup-lr", "0", "--min-lr", "0")
    assert train(images, tmp_path, *still, "--no-model-ema", "--stop-at-epoch", "1") == 0
    assert train(images, tmp_path, *still, "--resume", "auto", "--stop-at-epoch", "2") == 0
    assert "the average of the weights starts from those of the checkpoint" in (
        capsys.readouterr().out
    )
    content = newest(tmp_path)
    for name, weight in content["model"].items():
        assert torch.equal(content["model_ema"][name], weight)


CHANGES = {
    "mixing and augmentation": ("--mixup", "0", "--aa", "none", "--hflip", "0", "--reprob", "0"),
    "accumulation": ("--accum-steps", "2"),
    "precision": ("--amp", "fp16"),
    "no average": ("--no-model-ema",),
    "decay of the average": ("--model-ema-decay", "0.5"),
    "freezing": ("--freeze", "blocks.*"),
    "class weights": ("--class-weights", "balanced"),
    "loss": ("--loss", "bce"),
    "sampler": ("--no-repeated-aug", "--sampler", "balanced"),
    "optimiser's options": ("--weight-decay", "0.2", "--opt-betas", "0.8", "0.9"),
    "schedule": ("--sched", "step", "--decay-epochs", "1"),
}


@pytest.mark.parametrize("more", CHANGES.values(), ids=CHANGES.keys())
def test_what_is_taken_anew_trains_on(images, tmp_path, capsys, more):
    """From the middle of the second epoch to the end."""
    with stopped_after(8):
        assert train(images, tmp_path) == STOPPED
    capsys.readouterr()
    assert train(images, tmp_path, "--resume", "auto", *more) == 0
    out = capsys.readouterr().out
    name = more[0].removeprefix("--no-")
    assert f"  --{name.removeprefix('--')} is " in out
    assert [r["epoch"] for r in logged(tmp_path)] == [1, 2, 3]
    assert ("in another order" in out) == (more[0] == "--no-repeated-aug")


def test_epochs_are_counted_one_way(images, tmp_path, capsys):
    """Console, log, checkpoint, inspect and the names of files."""
    assert train(images, tmp_path, "--stop-at-epoch", "2", "--best-metric", "train_loss") == 0
    out = capsys.readouterr().out
    assert "epoch 2/3  train loss" in out and "epoch 3" not in out
    for record in logged(tmp_path):
        assert 0 <= record["train_acc1"] <= 100
        assert f"train top-1 {record['train_acc1']:.2f} %" in out
    assert [r["epoch"] for r in logged(tmp_path)] == [1, 2]
    content = load_checkpoint(tmp_path / "checkpoint-0002.pth")
    progress = content["progress"]
    assert progress["epoch"] == content["metrics"]["epoch"] == 2
    assert f"after epoch {progress['best_epoch']}" in out
    assert inspect.main([str(tmp_path / "checkpoint-0002.pth"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["epoch"] == found["metrics"]["epoch"] == 2


def test_a_log_that_counts_from_zero_is_read_as_one_from_one(images, tmp_path):
    assert train(images, tmp_path, "--stop-at-epoch", "2") == 0
    log = tmp_path / "log.txt"
    whole = logged(tmp_path)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(r | {"epoch": r["epoch"] - 1}) + "\n" for r in lines))
    assert train(images, tmp_path, "--resume", "auto") == 0
    assert [r["epoch"] for r in logged(tmp_path)] == [1, 2, 3]
    assert logged(tmp_path)[:2] == whole
