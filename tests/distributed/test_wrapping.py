"""FSDP2 against DDP: the same weights, and checkpoints that stand for each other."""

import pytest
import torch
from runs import PLAIN, assert_close, assert_same_state, logged, train, train_together

from checkpointing.folder import checkpoints_in, newer_checkpoints
from inference import load_for_inference


@pytest.mark.parametrize("opt", ["adamw", "lamb", "sgd"])
def test_sharded_training_equals_replicated(images, tmp_path, opt):
    """Same weights, average and scores to rounding, with accumulation and clipping."""
    options = ("--epochs", "2", "--batch-size", "2", "--opt", opt)
    options += ("--accum-steps", "2", "--clip-grad", "0.5")
    whole = train_together(images, tmp_path / "ddp", *options)
    sharded = train_together(images, tmp_path / "fsdp", *options, "--fsdp")
    assert_close(whole, sharded)
    assert_close(whole, sharded, "model_ema")
    for left, right in zip(logged(tmp_path / "ddp"), logged(tmp_path / "fsdp"), strict=True):
        assert left["test_acc1"] == right["test_acc1"]
        assert left["train_loss"] == pytest.approx(right["train_loss"], rel=1e-5)
    best = load_for_inference(tmp_path / "fsdp" / "best.pth")
    x = torch.randn(2, 3, 8, 8)
    expected = load_for_inference(tmp_path / "ddp" / "best.pth").model(x)
    torch.testing.assert_close(best.model(x), expected, rtol=1e-3, atol=1e-4)


def test_sharded_run_resumes_exactly_in_mid_epoch(images, tmp_path):
    options = ("--epochs", "2", "--batch-size", "2", "--fsdp")
    options += ("--save-every-steps", "4", "--keep", "20")
    expected = train_together(images, tmp_path / "whole", *options)
    folder = tmp_path / "parts"
    train_together(images, folder, *options)
    middle = folder / "checkpoint-0000-00000016.shards"
    for later in newer_checkpoints(folder, 0, 16):
        later.rename(tmp_path / later.name)
    assert checkpoints_in(folder)[0] == middle
    again = train_together(images, folder, *options, "--resume", "auto")
    assert_same_state(expected, again)
    assert logged(folder) == logged(tmp_path / "whole")


def test_sharded_and_plain_checkpoints_stand_for_each_other(images, tmp_path):
    """Two sharded processes, then one, then two sharded again, against an untouched plain run."""
    plain = ("--batch-size", "4", "--opt", "sgd", *PLAIN)
    expected = train_together(images, tmp_path / "plain", *plain, world=1)
    two = ("--batch-size", "2", "--opt", "sgd", *PLAIN)
    folder = tmp_path / "mixed"
    train_together(images, folder, *two, "--fsdp", "--stop-at-epoch", "1")
    train_together(images, folder, *plain, "--resume", "auto", "--stop-at-epoch", "2", world=1)
    mixed = train_together(images, folder, *two, "--fsdp", "--resume", "auto")
    assert_close(expected, mixed)
    assert [p.suffix for p in checkpoints_in(folder)][:2] == [".shards", ".pth"]


@pytest.mark.parametrize(
    "options, names",
    [
        (("--fsdp",), "--fsdp: one process"),
        (("--fsdp", "--amp", "fp16"), "--amp: with --fsdp"),
        (("--fsdp", "--opt", "adafactor"), "--opt: with --fsdp"),
    ],
)
def test_what_cannot_be_sharded_is_said(images, tmp_path, capsys, options, names):
    assert train(images, tmp_path / "run", *options) == 2
    assert names in capsys.readouterr().err
