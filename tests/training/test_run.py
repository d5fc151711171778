"""Whole runs: bad input, the files they write, plug-ins, and what single options do.

Also of training/trainer.py.
"""

import json
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from runs import (
    CLASSES,
    PATIENCE,
    PLAIN,
    STOPPED,
    arguments,
    logged,
    newest,
    start_process,
    stopped_after,
    train,
)

import main
from checkpointing.files import load_checkpoint

# --- bad input ----------------------------------------------------------------------------------

BAD_INPUT = {
    "unknown model": (("--model", "deit_smal"), "--model", "deit_small"),
    "unknown data set": (("--data-set", "CIFAR11"), "--data-set", "CIFAR10"),
    "no such folder": (("--data-path", "/nowhere/at/all"), "--data-path", "does not exist"),
    "input size": (("--input-size", "10"), "--input-size", "patch"),
    "batch size": (("--batch-size", "25"), "--batch-size", "24"),
    "resume missing": (("--resume", "/nowhere.pth"), "/nowhere.pth", "does not exist"),
    "finetune missing": (("--finetune", "/nowhere.pth"), "/nowhere.pth", "does not exist"),
    "http": (("--finetune", "http://example.org/x.pth"), "https", "http://example.org"),
    "no teacher": (("--distillation-type", "hard"), "--distillation-type", "--teacher-path"),
    "balanced and repeated": (("--sampler", "balanced"), "--sampler", "--no-repeated-aug"),
    "bce and smoothing": (("--bce-loss",), "--bce-loss", "--smoothing 0"),
    "optimiser": (("--opt", "adamww"), "--opt", "adamw"),
    "policy": (("--aa", "rnd-m9"), "--aa", "rnd-m9"),
    "device": (("--device", "gpu"), "--device", "cuda"),
    "launcher": (("--distributed",), "--distributed", "torchrun"),
    "plugin": (("--plugin", "/nowhere/mine.py"), "--plugin", "does not exist"),
    "freeze": (("--freeze", "encoder.*"), "--freeze", "encoder.*"),
    "best_metric": (("--best-metric", "test_acc5"), "--best-metric", "test_acc1"),
    "drop block": (("--drop-block", "0.1"), "--drop-block", "leave it out"),
    "accumulation": (("--accum-steps", "7"), "--accum-steps", "6"),
    "overfit": (("--overfit-batches", "7"), "--overfit-batches", "24"),
    "mean": (("--mean", "0.5", "0.5"), "--mean", "one or three"),
    "mean range": (("--mean", "128"), "--mean", "at most 1"),
    "eval mode and distillation": (
        ("--distillation-type", "hard", "--teacher-path", "x", "--no-train-mode"),
        "--train-mode",
        "leave out --no-train-mode",
    ),
    "warm-up": (("--warmup-epochs", "3"), "--warmup-epochs", "--epochs 3"),
}


@pytest.mark.parametrize("options, names, fix", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_clear_line(images, tmp_path, capsys, options, names, fix):
    assert train(images, tmp_path / "run", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert names in error and fix in error, error


def test_skipped_images_are_listed(images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data" / "train" / "blue" / "2.png").write_bytes(b"\x89PNG but not really")
    assert train(tmp_path / "data", tmp_path / "a") == 2
    assert "blue/2.png" in capsys.readouterr().err
    options = ("--on-bad-image", "skip", "--no-repeated-aug")
    assert train(tmp_path / "data", tmp_path / "b", *options) == 0
    assert "1 images could not be read" in capsys.readouterr().out
    assert "blue/2.png" in (tmp_path / "b" / "bad_images.txt").read_text()


NAMES = (
    "$(touch pwned).png",
    "; touch pwned;.png",
    "`touch pwned`.png",
    "a\nb.png",
    "\x1b[2Jx.png",
    "x..\\..\\x.png",
    "-rf.png",
)


def test_names_of_images_never_run_or_leave_the_folder(images, tmp_path, monkeypatch, capsys):
    """Names with a shell's and a terminal's commands, of images that can't be read."""
    root, folder = tmp_path / "images", tmp_path / "run"
    shutil.copytree(images, root)
    strange = "$(touch pwned)"
    for part in ("train", "val"):
        shutil.copytree(images / part / "amber", root / part / strange)
    for name in NAMES:
        (root / "train" / strange / name).write_bytes(b"not an image")
    monkeypatch.chdir(tmp_path)
    before = {p for p in tmp_path.rglob("*") if folder not in (p, *p.parents)}
    options = ("--on-bad-image", "skip", "--no-repeated-aug", "--epochs", "2", "--batch-size", "3")
    assert train(root, folder, *options) == 0
    output = capsys.readouterr().out
    assert "\x1b[2J" not in output
    listed = (folder / "bad_images.txt").read_text().splitlines()
    assert all("not an image" in line for line in listed)
    assert len(listed) == len(NAMES), "\n".join(listed)
    after = {p for p in tmp_path.rglob("*") if folder not in (p, *p.parents)}
    assert after == before
    assert not list(folder.rglob("*pwned*"))


# --- the files of a run -------------------------------------------------------------------------


def with_tensorboard(argv: list[str]) -> list[str]:
    return [argument for argument in argv if argument != "--no-tensorboard"]


def events_of(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_files_of_a_run(images, tmp_path, curves):
    argv = arguments(images, tmp_path, "--tb-histograms", "--tb-graph")
    assert main.main(with_tensorboard(argv)) == 0
    records = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    wanted = {"train_lr", "train_loss", "test_loss", "test_acc1", "epoch", "n_parameters"}
    assert wanted <= records[0].keys() and [r["epoch"] for r in records] == [1, 2, 3]
    assert "test_acc5" not in records[0]  # three classes
    assert Image.open(tmp_path / "curves.png").size[0] > 600
    rows = (tmp_path / "per_class.csv").read_text().splitlines()
    assert rows[0] == "class,images,correct,accuracy"
    numbers = [["amber", "3"], ["blue", "2"], ["crimson", "3"]]
    assert [row.split(",")[:2] for row in rows[1:]] == numbers
    events = events_of(tmp_path)
    tags = events.Tags()
    assert "train/augmented" in tags["images"] and tags["graph"]
    assert any("session_start_info" in name for name in events.PluginTagToContent("hparams"))
    assert {"epoch/test_acc1", "step/loss", "step/lr"} <= set(tags["scalars"])
    assert "weights/blocks.0.attn.qkv.weight" in tags["histograms"]
    assert [e.step for e in events.Scalars("epoch/test_acc1")] == [6, 12, 18]
    losses = events.Scalars("step/loss")
    assert [e.step for e in losses] == [1, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    first_epoch = sum(share * e.value for share, e in zip((1, 1, 2, 2), losses, strict=False)) / 6
    assert records[0]["train_loss"] == pytest.approx(first_epoch)


def test_tensorboard_goes_on_without_gap_or_duplicate(images, tmp_path):
    whole = with_tensorboard(arguments(images, tmp_path / "whole"))
    parts = with_tensorboard(arguments(images, tmp_path / "parts"))
    assert main.main(whole) == 0
    with stopped_after(9):
        assert main.main(parts) == STOPPED
    assert main.main([*parts, "--resume", "auto"]) == 0
    events = [events_of(tmp_path / name) for name in ("whole", "parts")]
    for tag in ("step/loss", "step/lr", "step/grad_norm", "epoch/test_loss", "epoch/ema_acc1"):
        curves = [[(e.step, e.value) for e in run.Scalars(tag)] for run in events]
        assert curves[0] == curves[1], tag


# --- single options -----------------------------------------------------------------------------


def test_overfit_batches_reaches_zero_loss(images, tmp_path):
    options = ("--overfit-batches", "2", "--epochs", "20", "--lr", "0.2", "--print-epoch", "20")
    assert train(images, tmp_path, *options, "--no-model-ema") == 0
    last = logged(tmp_path)[-1]
    assert last["train_loss"] < 0.05 and last["test_acc1"] == 100


def test_frozen_parameters_stay_until_unfrozen(images, tmp_path):
    options = ("--freeze", "*", "--unfreeze-at", "0:head.*", "1:blocks.5.*")
    options += ("--weight-decay", "0.5")
    weights = []
    for epoch in (1, 2):
        resume = ("--resume", "auto") if epoch > 1 else ()
        assert train(images, tmp_path, *options, *resume, "--stop-at-epoch", str(epoch)) == 0
        weights.append(newest(tmp_path)["model"])
    changed = {k for k in weights[0] if not torch.equal(weights[0][k], weights[1][k])}
    assert changed and all(k.startswith(("head.", "blocks.5.")) for k in changed)
    assert "blocks.5.mlp.fc1.weight" in changed


def test_distillation_trains_both_heads_and_leaves_the_teacher_out(images, tmp_path):
    assert train(images, tmp_path / "teacher", "--model", "modern_lenet", "--input-size", "32") == 0
    student = "deit_nano_distilled_patch4_32"
    options = ("--model", student, "--distillation-type", "hard", "--input-size", "32")
    options += ("--teacher-model", "modern_lenet")
    options += ("--teacher-path", str(tmp_path / "teacher" / "best.pth"))
    assert train(images, tmp_path / "student", *options, "--epochs", "2") == 0
    weights = newest(tmp_path / "student")["model"]
    assert {"head.weight", "head_dist.weight"} <= weights.keys()
    assert weights.keys() == timm.create_model(student).state_dict().keys()


def test_finetune_takes_over_what_fits(images, tmp_path, capsys):
    assert train(images, tmp_path / "start", "--epochs", "2") == 0
    start = load_checkpoint(tmp_path / "start" / "best.pth")["model"]
    options = ("--finetune", str(tmp_path / "start" / "best.pth"), "--data-set", "DIGITS")
    options += ("--input-size", "12", "--epochs", "2", "--batch-size", "256", "--lr", "0")
    options += ("--warmup-lr", "0", "--min-lr", "0")
    assert train(images, tmp_path / "fine", *options) == 0
    fine = newest(tmp_path / "fine")["model"]
    shown = capsys.readouterr().out
    assert "finetune" in shown and "pos_embed" in shown and "head" in shown
    assert torch.equal(fine["blocks.3.attn.qkv.weight"], start["blocks.3.attn.qkv.weight"])
    assert fine["pos_embed"].shape == (1, 10, 128) and fine["head.weight"].shape == (10, 128)


# --- data sets and models from elsewhere --------------------------------------------------------


def test_plugin_brings_model_and_data_set(tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "import numpy as np, timm\n"
        "from torch import nn\n"
        "from datasets import ArraySource, register_dataset\n"
        "@timm.models.register_model\n"
        "def my_linear(pretrained=False, num_classes=10, **kwargs):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))\n"
        "@register_dataset('stripes')\n"
        "def stripes(is_train, options, seed):\n"
        "    pixels = np.zeros((16, 8, 8), np.uint8)\n"
        "    pixels[::2, ::2] = 255\n"
        "    return ArraySource(pixels, [0, 1] * 8, ['striped', 'plain'], 'stripes')\n"
    )
    options = ("--plugin", str(plugin), "--model", "my_linear", "--data-set", "stripes")
    assert train(tmp_path, tmp_path / "run", *options, *PLAIN) == 0
    assert newest(tmp_path / "run")["class_names"] == ["striped", "plain"]


def has_hugging_face() -> bool:
    try:
        return bool(metadata.version("datasets"))  # a package of the name of our datasets.py
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not has_hugging_face(), reason="needs: pip install datasets")
def test_hugging_face_set_trains(images, tmp_path):
    """The real package reads the images as an image folder."""
    argv = arguments("", tmp_path / "run", "--data-set", f"hfds/{images}", "--epochs", "2")
    place = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    process = start_process([*argv, "--num-workers", "1"], **place)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert newest(tmp_path / "run")["class_names"] == list(CLASSES)
    assert "24 training and 8 validation images" in output
