"""Whole runs on tiny pictures: resume, evaluation, faults, several processes, the command line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import checkpoint
import engine
import main
import trainer
import utils
from datasets import Batch
from inference import load_for_inference
from losses import CrossEntropy
from state import TrainState

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("amber", "blue", "crimson")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """24 training and 10 validation pictures of three colours, 14×12 pixels."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    base = {"amber": (200, 150, 30), "blue": (40, 60, 200), "crimson": (190, 30, 60)}
    for part, count in (("train", 8), ("val", 3)):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for i in range(count - (part == "val" and name == "blue")):
                noise = rng.integers(-40, 40, (12, 14, 3))
                pixels = np.clip(np.array(base[name]) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def arguments(pictures: Path, folder: Path, *more: str) -> list[str]:
    argv = ["--data-path", pictures, "--output-dir", folder, "--model", "deit_nano_patch4_32"]
    argv += ["--input-size", "8", "--batch-size", "4", "--epochs", "3", "--warmup-epochs", "1"]
    argv += ["--num-workers", "0", "--device", "cpu", "--lr", "0.01", "--log-interval", "2"]
    return [str(a) for a in (*argv, "--no-tensorboard", *more)]


def train(pictures: Path, folder: Path, *more: str) -> int:
    return main.main(arguments(pictures, folder, *more))


def newest(folder: Path) -> dict:
    return checkpoint.load_latest(folder)[1]


def stop_after(monkeypatch, updates: int) -> None:
    """Make the run believe, after that many updates of this session, that it got SIGTERM."""
    calls = iter(range(1, 10**6))
    original = trainer.Trainer._wish

    def wish(self, stop: utils.StopRequest) -> engine.Wish:
        if next(calls) == updates:
            stop.signal = signal.SIGTERM
        return original(self, stop)

    monkeypatch.setattr(trainer.Trainer, "_wish", wish)


def assert_same_state(left: dict, right: dict) -> None:
    """Bitwise equality of everything a checkpoint holds, but for times."""
    for part in ("model", "model_ema", "optimizer", "schedule", "scaler", "progress"):
        assert_equal(left[part], right[part], part)


def assert_equal(left, right, where: str) -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_equal(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_equal(a, b, f"{where}[{i}]")
    else:
        assert left == right, where


def logged(folder: Path) -> list[dict]:
    lines = (folder / "log.txt").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "epoch_seconds"} for line in lines]


# --- resume ---------------------------------------------------------------------------------------

RESUME_CASES = {
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
}  # fmt: skip


@pytest.mark.parametrize("options", RESUME_CASES.values(), ids=RESUME_CASES.keys())
@pytest.mark.parametrize("updates", [4, 9])
def test_resume_in_mid_epoch_is_exact(pictures, tmp_path, monkeypatch, options, updates):
    assert train(pictures, tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, updates)
        assert train(pictures, tmp_path / "parts", *options) == 128 + signal.SIGTERM
    assert checkpoint.in_folder(tmp_path / "parts")[0].name != "checkpoint-0003.pth"
    # Not even the saved generators are needed: what a step draws is a function of its place.
    monkeypatch.setattr(utils, "set_rng_state", lambda state: None)
    assert train(pictures, tmp_path / "parts", *options, "--resume", "auto") == 0
    assert_same_state(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def test_resume_at_an_epoch_with_another_worker_count_is_exact(pictures, tmp_path):
    assert train(pictures, tmp_path / "whole", "--num-workers", "1") == 0
    assert train(pictures, tmp_path / "parts", "--stop-at-epoch", "2") == 0
    assert len(logged(tmp_path / "parts")) == 2
    resume = ("--resume", "auto", "--num-workers", "2")
    assert train(pictures, tmp_path / "parts", *resume) == 0
    assert_same_state(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def test_resume_file_alone_takes_options_from_the_checkpoint(pictures, tmp_path, capsys):
    assert train(pictures, tmp_path / "whole") == 0
    assert train(pictures, tmp_path / "parts", "--stop-at-epoch", "1") == 0
    command = re.search(r"next +python main.py (.*)", capsys.readouterr().out.split("parts")[-2])
    assert main.main(["--resume", str(tmp_path / "parts" / "checkpoint-0001.pth")]) == 0
    assert command is None or "--resume" in command[1]
    assert_same_state(newest(tmp_path / "whole"), newest(tmp_path / "parts"))


def test_resume_says_what_changed(pictures, tmp_path, capsys):
    assert train(pictures, tmp_path, "--stop-at-epoch", "1") == 0
    assert (
        train(pictures, tmp_path, "--resume", "auto", "--lr", "0.02", "--stop-at-epoch", "2") == 0
    )
    assert "--lr is 0.02 now, was 0.01" in capsys.readouterr().out


def test_damaged_newest_checkpoint_is_passed_over(pictures, tmp_path, capsys):
    assert train(pictures, tmp_path / "whole") == 0
    assert train(pictures, tmp_path / "parts", "--stop-at-epoch", "2") == 0
    damaged = tmp_path / "parts" / "checkpoint-0002.pth"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert train(pictures, tmp_path / "parts", "--resume", "auto") == 0
    assert "checkpoint-0002.pth is damaged" in capsys.readouterr().out
    assert_same_state(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def test_resume_keeps_the_best_score(pictures, tmp_path):
    assert train(pictures, tmp_path, "--stop-at-epoch", "2") == 0
    before = newest(tmp_path)["progress"]
    assert train(pictures, tmp_path, "--resume", "auto") == 0
    after = newest(tmp_path)["progress"]
    assert after["best"] >= before["best"] > 0
    best = max(r["test_acc1"] for r in logged(tmp_path))
    assert after["best"] == best
    assert checkpoint.load_file(tmp_path / "best.pth")["metrics"]["test_acc1"] == best


def test_going_back_puts_the_abandoned_future_aside(pictures, tmp_path, capsys):
    assert train(pictures, tmp_path, "--keep", "9", "--best-metric", "train_loss") == 0
    start = str(tmp_path / "checkpoint-0001.pth")
    capsys.readouterr()
    assert main.main(["--resume", start, "--epochs", "2", "--warmup-epochs", "0"]) == 0
    assert "3 newer checkpoints were put into" in capsys.readouterr().out
    aside = {p.name for p in (tmp_path / "set-aside").iterdir()}
    assert aside == {"checkpoint-0002.pth", "checkpoint-0003.pth", "best.pth"}
    names = [p.name for p in checkpoint.in_folder(tmp_path)]
    assert names == ["checkpoint-0002.pth", "checkpoint-0001.pth"]
    assert [r["epoch"] for r in logged(tmp_path)] == [0, 1]
    assert checkpoint.load_file(tmp_path / "best.pth")["progress"]["epoch"] <= 2


def test_resume_into_the_folder_of_another_run_is_refused(pictures, tmp_path, capsys):
    assert train(pictures, tmp_path / "a", "--stop-at-epoch", "1") == 0
    assert train(pictures, tmp_path / "b", "--stop-at-epoch", "1") == 0
    before = (tmp_path / "b" / "log.txt").read_bytes()
    start = str(tmp_path / "a" / "checkpoint-0001.pth")
    assert main.main(["--resume", start, "--output-dir", str(tmp_path / "b")]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "b" / "log.txt").read_bytes() == before


def test_resume_with_another_optimiser_is_an_error(pictures, tmp_path, capsys):
    assert train(pictures, tmp_path, "--stop-at-epoch", "1") == 0
    for opt in ("sgd", "lamb", "adam"):
        assert train(pictures, tmp_path, "--resume", "auto", "--opt", opt) == 2
        assert "written with --opt adamw" in capsys.readouterr().err


def test_resume_does_not_need_the_weights_it_started_from(pictures, tmp_path):
    assert train(pictures, tmp_path / "start", "--stop-at-epoch", "1") == 0
    weights = tmp_path / "weights.pth"
    weights.write_bytes((tmp_path / "start" / "best.pth").read_bytes())
    fine = ("--finetune", str(weights))
    assert train(pictures, tmp_path / "fine", *fine, "--stop-at-epoch", "1") == 0
    weights.unlink()
    assert train(pictures, tmp_path / "fine", *fine, "--resume", "auto") == 0


def test_early_stop_waits_for_real_progress():
    """Steps smaller than the delta add up until they are progress."""
    from state import is_better

    reference, progress = None, []
    for epoch, value in enumerate((50.0, 50.4, 50.8, 50.9, 51.0, 51.4)):
        if is_better(value, reference, lower=False, delta=0.5):
            reference = value
            progress.append(epoch)
    assert progress == [0, 2, 5]


def test_a_directory_that_holds_a_run_is_refused(pictures, tmp_path, capsys):
    assert train(pictures, tmp_path, "--stop-at-epoch", "1") == 0
    before = (tmp_path / "log.txt").read_bytes()
    assert train(pictures, tmp_path) == 2
    error = capsys.readouterr().err
    assert "--resume auto" in error and "--output-dir" in error
    assert (tmp_path / "log.txt").read_bytes() == before


def test_resume_of_another_model_or_class_count_is_an_error(pictures, tmp_path, capsys):
    assert train(pictures, tmp_path, "--stop-at-epoch", "1") == 0
    assert train(pictures, tmp_path, "--resume", "auto", "--model", "modern_lenet") == 2
    assert "another model or class count" in capsys.readouterr().err
    assert train(pictures, tmp_path, "--resume", "auto", "--data-set", "DIGITS") == 2
    assert "head.weight is (3, 128) there and (10, 128) here" in capsys.readouterr().err


def test_checkpoints_within_an_epoch(pictures, tmp_path, monkeypatch):
    """Every second update and at each epoch; a run that dies later goes on from the newest."""
    assert train(pictures, tmp_path / "whole", "--save-every-steps", "2", "--keep", "99") == 0
    names = [p.name for p in checkpoint.in_folder(tmp_path / "whole")][::-1]
    within = [f"checkpoint-{e:04d}-{n:08d}.pth" for e in range(3) for n in (8, 16, 24)]
    assert [n for n in names if n.count("-") == 2] == within
    for die_at in ("checkpoint-0000-00000016.pth", "checkpoint-0002-00000008.pth"):
        folder = tmp_path / die_at
        folder.mkdir()
        for name in names[: names.index(die_at) + 1]:
            (folder / name).write_bytes((tmp_path / "whole" / name).read_bytes())
        (folder / "log.txt").write_bytes((tmp_path / "whole" / "log.txt").read_bytes())
        if "checkpoint-0001.pth" in names[: names.index(die_at)]:  # the best of this run
            checkpoint.set_best(folder, folder / "checkpoint-0001.pth")
        assert train(pictures, folder, "--resume", "auto", "--save-every-steps", "2") == 0
        assert_same_state(newest(tmp_path / "whole"), newest(folder))
        assert logged(tmp_path / "whole") == logged(folder)


def test_what_is_saved_is_the_state_at_that_moment(tmp_path):
    weights = torch.zeros(10**6)
    writer = checkpoint.BackgroundWriter(tmp_path, keep=9)
    for epoch in range(1, 4):
        weights.fill_(epoch)
        progress = {"epoch": epoch, "samples": 0}
        writer.submit({"model": {"w": weights}, "progress": progress}, best=False)
        weights.fill_(-1)
    writer.wait()
    for epoch in range(1, 4):
        saved = checkpoint.load_file(tmp_path / f"{checkpoint.name_of(epoch, 0)}.pth")
        assert torch.equal(saved["model"]["w"], torch.full((10**6,), float(epoch)))


def test_resume_with_another_batch_size_sees_each_picture_once(pictures, tmp_path, monkeypatch):
    seen: list[int] = []
    original = trainer.Trainer._watched

    def watched(self, batches):
        for batch in original(self, batches):
            if self.state.progress.epoch == 1:
                seen.extend(batch.positions.tolist())
            yield batch

    monkeypatch.setattr(trainer.Trainer, "_watched", watched)
    with monkeypatch.context() as patch:
        stop_after(patch, 8)  # two batches of four into the second epoch
        assert train(pictures, tmp_path, "--epochs", "2") == 128 + signal.SIGTERM
    resume = ("--epochs", "2", "--resume", "auto", "--batch-size", "8")
    assert train(pictures, tmp_path, *resume) == 0
    assert sorted(seen) == list(range(24))
    progress = newest(tmp_path)["progress"]
    assert progress["epoch"] == 2 and progress["update"] == 6  # three an epoch with batches of 8


def test_keep_and_save_every(pictures, tmp_path):
    assert train(pictures, tmp_path, "--keep", "1", "--best-metric", "train_loss") == 0
    names = {p.name for p in tmp_path.glob("*.pth")}
    assert names == {"checkpoint-0003.pth", "best.pth"}


# --- what is written ------------------------------------------------------------------------------


def test_saved_config_reproduces_the_run(pictures, tmp_path):
    options = ("--opt", "sgd", "--mixup", "0.3", "--aa", "none", "--freeze", "blocks.0.*")
    assert train(pictures, tmp_path / "a", *options, "--epochs", "2") == 0
    config, again = str(tmp_path / "a" / "config.yaml"), str(tmp_path / "b")
    assert main.main(["--config", config, "--output-dir", again]) == 0
    assert_same_state(newest(tmp_path / "a"), newest(tmp_path / "b"))


def test_files_of_a_run(pictures, tmp_path):
    argv = [
        a
        for a in arguments(pictures, tmp_path, "--tb-histograms", "--tb-graph")
        if a != "--no-tensorboard"
    ]
    assert main.main(argv) == 0
    records = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    wanted = {"train_lr", "train_loss", "test_loss", "test_acc1", "epoch", "n_parameters"}
    assert wanted <= records[0].keys() and [r["epoch"] for r in records] == [0, 1, 2]
    assert "test_acc5" not in records[0]  # three classes
    assert Image.open(tmp_path / "curves.png").size[0] > 600
    rows = (tmp_path / "per_class.csv").read_text().splitlines()
    assert rows[0] == "class,pictures,correct,accuracy"
    assert [row.split(",")[:2] for row in rows[1:]] == [
        ["amber", "3"],
        ["blue", "2"],
        ["crimson", "3"],
    ]
    events = events_of(tmp_path)
    tags = events.Tags()
    assert "train/augmented" in tags["images"] and tags["graph"]
    assert any("session_start_info" in name for name in events.PluginTagToContent("hparams"))
    assert {"epoch/test_acc1", "step/loss", "step/lr"} <= set(tags["scalars"])
    assert "weights/blocks.0.attn.qkv.weight" in tags["histograms"]
    assert [e.step for e in events.Scalars("epoch/test_acc1")] == [6, 12, 18]
    losses = events.Scalars("step/loss")
    assert [e.step for e in losses] == [1, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    first_epoch = (
        losses[0].value + losses[1].value + 2 * losses[2].value + 2 * losses[3].value
    ) / 6
    assert records[0]["train_loss"] == pytest.approx(first_epoch)


def events_of(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_goes_on_without_gap_or_duplicate(pictures, tmp_path, monkeypatch):
    def run(folder: str, *more: str) -> int:
        argv = arguments(pictures, tmp_path / folder, *more)
        return main.main([a for a in argv if a != "--no-tensorboard"])

    assert run("whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        assert run("parts") == 128 + signal.SIGTERM
    assert run("parts", "--resume", "auto") == 0
    whole, parts = events_of(tmp_path / "whole"), events_of(tmp_path / "parts")
    for tag in ("step/loss", "step/lr", "step/grad_norm", "epoch/test_loss", "epoch/ema_acc1"):
        curves = [[(e.step, e.value) for e in run.Scalars(tag)] for run in (whole, parts)]
        assert curves[0] == curves[1], tag


def test_checkpoint_is_plain_and_self_sufficient(pictures, tmp_path, capsys):
    assert train(pictures, tmp_path) == 0
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
        for path in (pictures / "val" / name).iterdir():
            with torch.no_grad():
                logits = model(transform(Image.open(path).convert("RGB"))[None])
            right += int(logits.argmax()) == label
            total += 1
    assert 100 * right / total == pytest.approx(metrics["test_acc1"])


def test_eval_takes_what_is_asked_for(pictures, tmp_path, capsys):
    assert train(pictures, tmp_path / "run", "--model", "modern_lenet", "--input-size", "32") == 0
    best = str(tmp_path / "run" / "best.pth")
    shown = {}
    for change in ((), ("--input-size", "24"), ("--mean", "0.9"), ("--eval-crop-ratio", "0.5")):
        capsys.readouterr()
        assert main.main(["--eval", "--resume", best, *change]) == 0
        shown[change] = re.search(r"model .*loss ([\d.]+)", capsys.readouterr().out)[1]
    assert len(set(shown.values())) >= 3
    assert shown[("--input-size", "24")] != shown[()] != shown[("--mean", "0.9")]
    assert main.main(["--eval", "--resume", best, "--model", "simple_cnn"]) == 2
    assert "holds modern_lenet" in capsys.readouterr().err


def test_eval_of_bare_weights_takes_the_model_from_the_command_line(pictures, tmp_path, capsys):
    assert train(pictures, tmp_path / "run") == 0
    content = checkpoint.load_file(tmp_path / "run" / "best.pth")
    torch.save({"model": content["model"]}, tmp_path / "published.pth")
    capsys.readouterr()
    argv = arguments(pictures, tmp_path / "judged", "--eval", "--resume")
    assert main.main([*argv, str(tmp_path / "published.pth")]) == 0
    assert f"top-1 {content['metrics']['test_acc1']:.3f} %" in capsys.readouterr().out
    assert main.main([*argv, str(tmp_path / "published.pth"), "--model", "modern_lenet"]) == 2


def test_eval_of_a_transformer_at_another_size(pictures, tmp_path):
    assert train(pictures, tmp_path) == 0
    best = str(tmp_path / "best.pth")
    assert main.main(["--eval", "--resume", best, "--input-size", "16"]) == 0


def test_eval_needs_no_training_part(pictures, tmp_path, capsys):
    import shutil

    assert train(pictures, tmp_path / "run") == 0
    best = str(tmp_path / "run" / "best.pth")
    (tmp_path / "only").mkdir()
    shutil.copytree(pictures / "val", tmp_path / "only" / "val")
    lines = ["path,label", *(f"val/amber/{i}.png,amber" for i in range(3))]
    (tmp_path / "only" / "some.csv").write_text("\n".join(lines))
    places = (("only",), ("only/val",), ("only/some.csv", "--data-set", "CSV"))
    for place, *more in places:
        capsys.readouterr()
        argv = ["--eval", "--resume", best, "--data-path", str(tmp_path / place), *more]
        assert main.main(argv) == 0
        assert f"({3 if more else 8} pictures)" in capsys.readouterr().out


def test_eval_names_what_it_could_not_read(pictures, tmp_path, capsys):
    import shutil

    assert train(pictures, tmp_path / "run") == 0
    best = str(tmp_path / "run" / "best.pth")
    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data" / "val" / "blue" / "1.png").write_bytes(b"nothing")
    argv = ["--eval", "--resume", best, "--data-path", str(tmp_path / "data")]
    assert main.main([*argv, "--on-bad-image", "skip"]) == 0
    shown = capsys.readouterr().out
    assert "(7 pictures)" in shown and "1 pictures could not be read" in shown
    assert "blue/1.png" in shown


def test_early_stop(pictures, tmp_path, capsys):
    # Nothing learns at a rate of zero, so the first epoch is the best.
    options = ("--lr", "0", "--warmup-lr", "0", "--min-lr", "0", "--early-stop", "2")
    options += ("--save-every", "9")
    assert train(pictures, tmp_path, *options, "--epochs", "6") == 0
    assert len(logged(tmp_path)) == 3
    assert newest(tmp_path)["progress"]["epoch"] == 3
    assert "early stop" in capsys.readouterr().out


def test_overfit_batches_reaches_zero_loss(pictures, tmp_path):
    options = ("--overfit-batches", "2", "--epochs", "20", "--lr", "0.2", "--print-epoch", "20")
    assert train(pictures, tmp_path, *options, "--no-model-ema") == 0
    last = logged(tmp_path)[-1]
    assert last["train_loss"] < 0.05 and last["test_acc1"] == 100


def test_frozen_parameters_stay_until_unfrozen(pictures, tmp_path):
    options = (
        "--freeze",
        "*",
        "--unfreeze-at",
        "0:head.*",
        "1:blocks.5.*",
        "--weight-decay",
        "0.5",
    )
    weights = []
    for epoch in (1, 2):
        resume = ("--resume", "auto") if epoch > 1 else ()
        assert train(pictures, tmp_path, *options, *resume, "--stop-at-epoch", str(epoch)) == 0
        weights.append(newest(tmp_path)["model"])
    changed = {k for k in weights[0] if not torch.equal(weights[0][k], weights[1][k])}
    assert changed and all(k.startswith(("head.", "blocks.5.")) for k in changed)
    assert "blocks.5.mlp.fc1.weight" in changed


def test_distillation_trains_both_heads_and_leaves_the_teacher_out(pictures, tmp_path):
    assert (
        train(pictures, tmp_path / "teacher", "--model", "modern_lenet", "--input-size", "32") == 0
    )
    options = ("--model", "deit_nano_distilled_patch4_32", "--distillation-type", "hard")
    options += ("--teacher-model", "modern_lenet", "--input-size", "32")
    options += ("--teacher-path", str(tmp_path / "teacher" / "best.pth"))
    assert train(pictures, tmp_path / "student", *options, "--epochs", "2") == 0
    content = newest(tmp_path / "student")
    assert "head_dist.weight" in content["model"]
    assert not any("teacher" in key for key in content["model"])
    assert len(content["model"]) == len(
        timm.create_model("deit_nano_distilled_patch4_32").state_dict()
    )


def test_finetune_takes_over_what_fits(pictures, tmp_path, capsys):
    assert train(pictures, tmp_path / "start", "--epochs", "2") == 0
    start = checkpoint.load_file(tmp_path / "start" / "best.pth")["model"]
    options = ("--finetune", str(tmp_path / "start" / "best.pth"), "--data-set", "DIGITS")
    options += ("--input-size", "12", "--epochs", "2", "--batch-size", "256", "--lr", "0")
    options += ("--warmup-lr", "0", "--min-lr", "0")
    assert train(pictures, tmp_path / "fine", *options) == 0
    fine = newest(tmp_path / "fine")["model"]
    shown = capsys.readouterr().out
    assert "finetune" in shown and "pos_embed" in shown and "head" in shown
    assert torch.equal(fine["blocks.3.attn.qkv.weight"], start["blocks.3.attn.qkv.weight"])
    assert fine["pos_embed"].shape == (1, 10, 128) and fine["head.weight"].shape == (10, 128)


# --- not finite -----------------------------------------------------------------------------------


class Fragile(nn.Module):
    """A linear classifier that gives NaN for a batch with a picture that is white in the middle."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Flatten()
        self.judge = nn.Identity()
        self.head = nn.Linear(3 * 8 * 8, num_classes)
        self.num_classes = num_classes

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        white = (x[:, :, 3:5, 3:5].amin((1, 2, 3)) > 0.99).any() & self.training
        return self.head(self.judge(self.body(x) * torch.where(white, float("nan"), 1.0)))


@timm.models.register_model
def overflowing(pretrained: bool = False, num_classes: int = 1000, **kwargs) -> nn.Module:
    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3 * 8 * 8, num_classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x.flatten(1)) * 1e5 / 1e5

    return Overflowing()


@pytest.fixture(scope="module")
def white_picture(tmp_path_factory, pictures) -> Path:
    """The pictures, one of the training set wholly white; a registered model that it breaks."""
    import shutil

    @timm.models.register_model
    def fragile(pretrained: bool = False, num_classes: int = 1000, **kwargs) -> nn.Module:
        return Fragile(num_classes)

    @timm.models.register_model
    def fragile_norm(pretrained: bool = False, num_classes: int = 1000, **kwargs) -> nn.Module:
        model = Fragile(num_classes)
        model.judge = nn.BatchNorm1d(3 * 8 * 8)
        return model

    root = tmp_path_factory.mktemp("white")
    shutil.copytree(pictures, root, dirs_exist_ok=True)
    Image.new("RGB", (14, 12), (255, 255, 255)).save(root / "train" / "blue" / "3.png")
    return root


PLAIN = ("--aa", "none", "--color-jitter", "none", "--reprob", "0", "--mixup", "0", "--cutmix", "0")
PLAIN += ("--no-repeated-aug", "--drop-path", "0", "--smoothing", "0")
FRAGILE = (*PLAIN, "--model", "fragile", "--mean", "0", "--std", "1", "--hflip", "0", "--src")


@pytest.mark.parametrize("opt", ["adamw", "lamb"])
def test_nonfinite_stop_names_step_rate_and_layer(white_picture, tmp_path, capsys, opt):
    assert train(white_picture, tmp_path, *FRAGILE, "--opt", opt) == 3
    error = capsys.readouterr().err
    where = re.search(r"update (\d+) \(epoch 1, step (\d+)\), learning rate ([\d.e-]+)", error)
    assert where and int(where[1]) == int(where[2]) - 1 and float(where[3]) > 0
    assert "the output of judge (Identity)" in error
    assert not checkpoint.in_folder(tmp_path)


@pytest.mark.parametrize("opt", ["adamw", "lamb"])
def test_nonfinite_skip_leaves_out_one_update_an_epoch(white_picture, tmp_path, opt):
    assert train(white_picture, tmp_path, *FRAGILE, "--on-nonfinite", "skip", "--opt", opt) == 0
    content = newest(tmp_path)
    assert content["progress"]["skipped"] == 3
    assert content["progress"]["update"] == 18
    assert all(torch.isfinite(v).all() for v in content["model"].values())
    assert logged(tmp_path)[-1]["skipped_updates"] == 3


def test_a_skipped_update_is_named_and_leaves_statistics_alone(white_picture, tmp_path):
    options = (*FRAGILE, "--model", "fragile_norm", "--on-nonfinite", "skip", "--epochs", "1")
    assert train(white_picture, tmp_path, *options, "--warmup-epochs", "0") == 0
    content = newest(tmp_path)
    assert content["progress"]["skipped"] == 1
    for name in ("model", "model_ema"):
        assert all(torch.isfinite(v).all() for v in content[name].values())
    report = json.loads((tmp_path / "nonfinite-rank0.json").read_text())
    assert len(report["pictures"]) == 4
    assert any(p.endswith("blue/3.png") for p in report["pictures"])


def test_nonfinite_stop_lists_the_pictures(white_picture, tmp_path):
    assert train(white_picture, tmp_path, *FRAGILE, "--accum-steps", "2") == 3
    report = json.loads((tmp_path / "nonfinite-rank0.json").read_text())
    assert report["first_nonfinite"] == "the output of judge (Identity)"
    assert len(report["pictures"]) == 8
    assert any(p.endswith("blue/3.png") for p in report["pictures"])


def test_rollback_to_full_precision_overcomes_an_overflow(pictures, tmp_path, capsys):
    """fp16 overflows at 65504; the model multiplies its way there, float32 does not mind."""
    options = (*PLAIN, "--model", "overflowing", "--amp", "fp16", "--on-nonfinite", "rollback")
    options += ("--rollback-fp32-steps", "100", "--no-model-ema")
    assert train(pictures, tmp_path, *options) == 0
    assert "in full precision for 100 updates" in capsys.readouterr().out
    assert newest(tmp_path)["progress"]["rollbacks"] == 1


def test_nonfinite_rollback_halves_the_rate_and_gives_up_in_the_end(
    white_picture, tmp_path, capsys
):
    assert train(white_picture, tmp_path, *FRAGILE, "--on-nonfinite", "rollback") == 3
    shown = capsys.readouterr()
    factors = re.findall(r"rate times ([\d.]+)", shown.out)
    assert [float(f) for f in factors] == [0.5**k for k in range(1, trainer.MAX_ROLLBACKS + 1)]
    assert "not finite" in shown.err


# --- the engine alone -----------------------------------------------------------------------------


def batches_of(images: torch.Tensor, targets: torch.Tensor, size: int) -> list[Batch]:
    numbers = torch.arange(len(targets))
    return [
        Batch(*(column[i : i + size] for column in (images, targets, numbers, numbers)), [])
        for i in range(0, len(targets), size)
    ]


def tiny_state(model: nn.Module, lr: float = 0.1) -> TrainState:
    import optim
    from config import OptimOptions, ScheduleOptions

    options = OptimOptions(opt="momentum", momentum=0.0, weight_decay=0.0)
    schedule = optim.Schedule(
        ScheduleOptions(sched="constant", warmup_epochs=0), lr=lr, epochs=1, updates_per_epoch=10
    )
    optimizer = optim.build_optimizer(model, options, lr=lr)
    return TrainState(model, optimizer, schedule, None, None, lambda m: m)


@pytest.mark.parametrize(
    "accum, expected_windows", [(1, [4] * 5), (2, [8, 8, 4]), (3, [12, 8]), (9, [20])]
)
def test_accumulation_equals_larger_batches(accum, expected_windows):
    """A window's gradients are those of its pictures in one batch, in a short last window too."""
    images, targets = torch.randn(20, 3, 8, 8), torch.randint(0, 3, (20,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    reference = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    reference.load_state_dict(model.state_dict())
    state = tiny_state(model)
    options = engine.StepOptions(torch.device("cpu"), batch_size=4, accum_steps=accum)
    done = engine.train_one_epoch(
        state, CrossEntropy(), batches_of(images, targets, 4), options, steps=5
    )
    assert done and state.progress.update == len(expected_windows)
    assert state.progress.step == 5 and state.progress.samples == 20
    start = 0
    for size in expected_windows:
        loss = nn.functional.cross_entropy(
            reference(images[start : start + size]), targets[start : start + size]
        )
        reference.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in reference.parameters():
                p -= 0.1 * p.grad
        start += size
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_ema_follows_the_formula():
    from state import ModelEma

    model = nn.Linear(2, 1, bias=False)
    average = ModelEma(model, 0.9, warmup=True)
    expected = model.weight.detach().clone()
    for update in range(30):
        with torch.no_grad():
            model.weight += torch.randn(1, 2)
        average.step(update)
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.module.weight, expected)


@pytest.mark.parametrize("size", [1, 3, 7, 23])
def test_evaluation_is_exact_for_every_batch_size(size):
    torch.manual_seed(1)
    logits, targets = torch.randn(23, 6), torch.randint(0, 6, (23,))
    images = torch.zeros(23, 3, 2, 2)
    images[:, 0, 0, 0] = torch.arange(23)

    class Lookup(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return logits[x[:, 0, 0, 0].long()]

    result = engine.evaluate(
        Lookup(),
        batches_of(images, targets, size),
        engine.StepOptions(torch.device("cpu")),
        num_classes=6,
        batch_size=size,
    )
    order = logits.argsort(1, descending=True)
    assert result.acc1 == 100 * sum(int(order[i, 0] == targets[i]) for i in range(23)) / 23
    assert result.acc5 == 100 * sum(int(targets[i] in order[i, :5]) for i in range(23)) / 23
    exponentials = np.exp(logits.double().numpy())
    shares = exponentials[np.arange(23), targets] / exponentials.sum(1)
    exact = -np.log(shares).mean()
    assert result.loss == pytest.approx(exact, abs=1e-6)
    assert result.count_per_class.tolist() == torch.bincount(targets, minlength=6).tolist()
    assert int(result.correct_per_class.sum()) == round(result.acc1 * 23 / 100)


# --- real processes -------------------------------------------------------------------------------


def run_process(argv: list[str], launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [sys.executable, *launcher, str(ROOT / "main.py"), *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_ctrl_c_saves_and_says_how_to_go_on(pictures, tmp_path):
    options = ("--epochs", "400", "--print-epoch", "1000", "--num-workers", "1")
    process = run_process(arguments(pictures, tmp_path, *options))
    while not (tmp_path / "log.txt").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    command = re.search(r"go on with: python main.py (.*)", output)[1]
    epoch = newest(tmp_path)["progress"]["epoch"]
    stop = str(epoch + 1)
    assert main.main([*command.split(), "--stop-at-epoch", stop]) == 0
    assert [r["epoch"] for r in logged(tmp_path)] == list(range(epoch + 1))


def test_two_processes_equal_one_of_twice_the_batch(pictures, tmp_path):
    """Without draws for a whole batch, 2 × B gives the weights of 1 × 2B, and the same scores."""
    options = (*PLAIN, "--epochs", "2", "--opt", "sgd", "--no-model-ema")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    argv = arguments(pictures, tmp_path / "two", *options, "--distributed")
    process = run_process(argv, launcher)
    assert train(pictures, tmp_path / "one", *options, "--batch-size", "8") == 0
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert output.count("learning rate") == 1  # one process speaks
    one, two = newest(tmp_path / "one"), newest(tmp_path / "two")
    for name, weight in one["model"].items():
        torch.testing.assert_close(weight, two["model"][name], rtol=1e-4, atol=1e-6, msg=name)
    for left, right in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        assert left["test_acc1"] == right["test_acc1"]
        assert left["train_loss"] == pytest.approx(right["train_loss"], rel=1e-5)
        assert left["train_lr"] == right["train_lr"]


def _has_hugging_face() -> bool:
    try:
        return bool(metadata.version("datasets"))  # a package of the name of our datasets.py
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not _has_hugging_face(), reason="needs: pip install datasets")
def test_hugging_face_set_trains(pictures, tmp_path, monkeypatch):
    """The real package reads the pictures as an image folder."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    argv = arguments(
        pictures, tmp_path / "run", "--data-set", f"hfds/{pictures}", "--data-path", ""
    )
    process = run_process([*argv, "--epochs", "2", "--num-workers", "1"])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert newest(tmp_path / "run")["class_names"] == list(CLASSES)
    assert "24 training and 8 validation pictures" in output


def test_two_processes_judge_the_batch_statistics_that_are_saved(pictures, tmp_path, capsys):
    """Each process gathers statistics of its own; what is logged must be what is saved."""
    options = ("--model", "modern_lenet", "--input-size", "16", "--epochs", "2")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = run_process(arguments(pictures, tmp_path, *options), launcher)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    record = logged(tmp_path)[-1]
    assert main.main(["--eval", "--resume", str(tmp_path / "checkpoint-0002.pth")]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"model .*loss {record['test_loss']:.4f}", shown), (record, shown)
    assert re.search(rf"EMA .*loss {record['ema_loss']:.4f}", shown), (record, shown)


# --- bad input ------------------------------------------------------------------------------------

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
        *("--train-mode", "leave out --no-train-mode"),
    ),
    "warm-up": (("--warmup-epochs", "3"), "--warmup-epochs", "--epochs 3"),
}  # fmt: skip


@pytest.mark.parametrize("options, names, fix", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_clear_line(pictures, tmp_path, capsys, options, names, fix):
    assert train(pictures, tmp_path / "run", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert names in error and fix in error, error


def test_output_directory_that_cannot_be_written(pictures, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train(pictures, tmp_path / "file" / "run") == 2
    assert "--output-dir" in capsys.readouterr().err


def test_full_disk_is_a_warning_and_at_the_end_an_error(pictures, tmp_path, capsys, monkeypatch):
    real = checkpoint.save
    failing = {"checkpoint-0002.pth"}

    def save(path: Path, content: dict) -> None:
        if path.name in failing:
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(checkpoint, "save", save)
    assert train(pictures, tmp_path / "a") == 0
    assert "No space left" in capsys.readouterr().out
    failing.add("checkpoint-0003.pth")
    assert train(pictures, tmp_path / "b") == 1
    assert checkpoint.in_folder(tmp_path / "b")[0].name == "checkpoint-0001.pth"


def test_skipped_pictures_are_listed(pictures, tmp_path, capsys):
    import shutil

    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data" / "train" / "blue" / "2.png").write_bytes(b"\x89PNG but not really")
    assert train(tmp_path / "data", tmp_path / "a") == 2
    assert "blue/2.png" in capsys.readouterr().err
    options = ("--on-bad-image", "skip", "--no-repeated-aug")
    assert train(tmp_path / "data", tmp_path / "b", *options) == 0
    assert "1 pictures could not be read" in capsys.readouterr().out
    assert "blue/2.png" in (tmp_path / "b" / "bad_images.txt").read_text()


def test_print_config_names_origins(pictures, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("lr: 1e-3\n")
    argv = ["--config", str(tmp_path / "mine.yaml"), "--epochs", "7", "--print-config"]
    assert main.main(argv) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^lr: 0.001 +# .*mine.yaml$", shown, re.M)
    assert re.search(r"^epochs: 7 +# command line$", shown, re.M)
    assert re.search(r"^batch_size: 64 +# default$", shown, re.M)


def test_plugin_brings_model_and_data_set(tmp_path):
    (tmp_path / "mine.py").write_text(
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
    options = (
        "--plugin",
        str(tmp_path / "mine.py"),
        "--model",
        "my_linear",
        "--data-set",
        "stripes",
    )
    assert train(tmp_path, tmp_path / "run", *options, *PLAIN) == 0
    assert newest(tmp_path / "run")["class_names"] == ["striped", "plain"]
