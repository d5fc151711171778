"""Whole runs on a CUDA card, skipped where there is none."""

import signal
import subprocess
from pathlib import Path

import holding
import pytest
import torch
from runs import PATIENCE, assert_equal, logged, newest, start_process

import main
from checkpointing.folder import checkpoints_in

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def command(folder: Path, *more: str) -> list[str]:
    argv = ["--data-set", "DIGITS", "--model", "deit_nano_patch4_32", "--input-size", "16"]
    argv += ["--device", "cuda", "--batch-size", "64", "--epochs", "2", "--warmup-epochs", "1"]
    argv += ["--num-workers", "0", "--output-dir", str(folder), "--no-tensorboard"]
    return [*argv, *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return newest(folder)["model"]


@pytest.mark.parametrize(
    "more",
    [
        ("--amp", "bf16"),
        ("--amp", "fp16", "--clip-grad", "1"),
        ("--amp", "off"),
        ("--opt", "sgd", "--lr", "0.05"),
        ("--opt", "lamb", "--accum-steps", "2"),
        ("--opt", "lion", "--lr", "1e-4"),
        ("--opt", "muon"),
        ("--on-nonfinite", "skip", "--clip-grad", "0.1", "--clip-mode", "agc"),
        ("--cosub", "--smoothing", "0"),
        ("--ThreeAugment", "--mixup-mode", "elem"),
        ("--augment-on", "cpu", "--num-workers", "2"),
        ("--cache", "none", "--num-workers", "2"),
        ("--cache", "device"),
        ("--model", "resnet18_cifar", "--input-size", "32"),
        ("--compile",),
        ("--compile", "--compile-mode", "reduce-overhead"),
        ("--grad-checkpointing",),
        ("--batch-size", "auto", "--effective-batch", "256"),
        ("--model-ema-force-cpu",),
        ("--unfreeze-at", "1:*", "--freeze", "blocks.*"),
    ],
    ids=" ".join,
)
def test_run(tmp_path, more):
    assert main.main(command(tmp_path, *more)) == 0
    record = logged(tmp_path)[-1]
    assert record["epoch"] == 2
    assert record["train_loss"] < 3.0
    assert all(w.isfinite().all() for w in weights(tmp_path).values())


def test_cait_fused(tmp_path):
    argv = command(tmp_path, "--model", "cait_XXS24_224", "--input-size", "32")
    assert main.main([*argv, "--talking-heads", "fused", "--epochs", "2"]) == 0
    assert logged(tmp_path)[-1]["train_loss"] < 3.0


def start(folder: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    # torch's deterministic algorithms ask for it.
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return start_process(command(folder, *more), **environment)


@pytest.mark.parametrize("more", [(), ("--amp", "fp16", "--opt", "sgd", "--lr", "0.05")])
def test_killed_and_resumed_is_bitwise_the_same(tmp_path, more):
    options = ("--deterministic", "--epochs", "4", "--save-every-steps", "5", *more)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    untouched = start(whole, *options)
    out, _ = untouched.communicate(timeout=PATIENCE)
    assert untouched.returncode == 0, out
    # In the second epoch of 22 updates: what was saved after 25 is on disk before 30 is saved.
    held = holding.variables(tmp_path, 31)
    run = start(parts, *options, *holding.OPTIONS, **held)
    holding.wait_for_hold(tmp_path, 0, lambda: run.poll() is not None, lambda: run.communicate()[0])
    assert checkpoints_in(parts)[0].stem.startswith("checkpoint-0001-")
    run.kill()
    run.communicate(timeout=30)
    assert run.returncode == -signal.SIGKILL
    (parts / "run.lock").unlink(missing_ok=True)
    again = start(parts, *options, "--resume", "auto")
    out, _ = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, out
    assert_equal(weights(whole), weights(parts), "model")


def test_out_of_memory_says_what_helps(tmp_path, capsys):
    argv = command(tmp_path, "--model", "deit_base_patch16_224", "--input-size", "768")
    argv += ["--batch-size", "1024", "--amp", "off", "--no-model-ema", "--aa", "none"]
    assert main.main(argv) != 0
    said = capsys.readouterr()
    assert "out of memory on cuda" in said.out + said.err
    assert "--batch-size 512 --accum-steps 2" in said.out + said.err
