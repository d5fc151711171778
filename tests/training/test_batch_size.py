"""--batch-size auto, and what is said where memory ends."""

import pytest
from runs import assert_equal, logged, newest, train

HUNGRY = """
import timm
import torch
from torch import nn

class Hungry(nn.Module):
    seen = 0

    def forward(self, x):
        self.seen += 1
        # A petabyte, which the host's allocator refuses.
        torch.empty(1 << 50 if {too_much} else 1)
        return x

@timm.models.register_model
def hungry(pretrained=False, num_classes=2, **kwargs):
    return nn.Sequential(Hungry(), nn.Flatten(), nn.Linear(192, num_classes))
"""


@pytest.fixture
def hungry(tmp_path):
    """hungry(condition): options for a model that runs out of memory where that is true."""

    def options(too_much: str) -> tuple[str, ...]:
        (tmp_path / "hungry.py").write_text(HUNGRY.format(too_much=too_much))
        return "--plugin", str(tmp_path / "hungry.py"), "--model", "hungry"

    return options


def test_too_little_memory_says_batch_size_and_what_helps(images, tmp_path, capsys, hungry):
    options = (*hungry("len(x) > 3"), "--accum-steps", "2")
    assert train(images, tmp_path / "run", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory on cpu with --batch-size 4")
    assert "--batch-size 2 --accum-steps 4" in error and "--grad-checkpointing" in error
    assert "--amp bf16" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run" / "run.lock").exists()


def test_automatic_batch_is_the_largest_that_fits(images, tmp_path, capsys, hungry):
    """Four images are too many; the update keeps its twelve."""
    options = (*hungry("len(x) > 3"), "--no-repeated-aug", "--eval-batch-size", "2")
    auto = ("--batch-size", "auto", "--effective-batch", "12")
    assert train(images, tmp_path / "run", *options, *auto) == 0
    assert "12 = 3 × 1 process(es) × 4 accumulated" in capsys.readouterr().out
    found = newest(tmp_path / "run")
    assert found["config"]["batch_size"] == 3 and found["config"]["accum_steps"] == 4
    by_hand = ("--batch-size", "3", "--accum-steps", "4")
    assert train(images, tmp_path / "hand", *options, *by_hand) == 0
    expected = newest(tmp_path / "hand")
    for part in ("model", "optimizer", "progress"):
        assert_equal(found[part], expected[part], part)


def test_automatic_batch_steps_down_when_memory_ends_later(images, tmp_path, capsys, hungry):
    """After an epoch six images are too many: the run goes on from its checkpoint with four."""
    options = (*hungry("len(x) > 5 and self.training and self.seen > 4"), "--no-repeated-aug")
    options += ("--batch-size", "auto", "--effective-batch", "12", "--save-every-steps", "1")
    assert train(images, tmp_path / "run", *options, "--no-model-ema") == 0
    output = capsys.readouterr().out
    assert "12 = 12 × 1" in output and "resumed" in output and "12 = 4 × 1" in output
    assert [record["epoch"] for record in logged(tmp_path / "run")] == [1, 2, 3]


NORMED = """
import timm
from torch import nn

@timm.models.register_model
def normed(pretrained=False, num_classes=2, **kwargs):
    pooled = nn.AdaptiveAvgPool2d(1) if {pooled} else nn.Identity()
    size = 3 if {pooled} else 192
    return nn.Sequential(pooled, nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(size, num_classes))
"""


@pytest.mark.parametrize("pooled", [True, False])
def test_one_image_without_batch_statistics_is_refused_before_training(
    images, tmp_path, capsys, pooled
):
    (tmp_path / "normed.py").write_text(NORMED.format(pooled=pooled))
    options = ["--plugin", str(tmp_path / "normed.py"), "--model", "normed", "--batch-size", "1"]
    options += ["--epochs", "1", "--warmup-epochs", "0"]
    assert train(images, tmp_path / "run", *options) == (2 if pooled else 0)
    if pooled:
        output = capsys.readouterr()
        assert "error: --batch-size: 1 image has no batch statistics" in output.err
        assert "epoch 1" not in output.out and not (tmp_path / "run" / "config.yaml").exists()


def test_automatic_batch_of_a_small_set(images, tmp_path, capsys):
    """The fixture has 24 images: of four updates per epoch each has 4, the power of two below 6."""
    assert train(images, tmp_path / "run", "--batch-size", "auto", "--epochs", "2") == 0
    assert "4 = 4 × 1 process(es) × 1 accumulated" in capsys.readouterr().out
    options = ("--batch-size", "auto", "--effective-batch", "48")
    assert train(images, tmp_path / "other", *options) == 2
    assert "--effective-batch: 48 images per update are more than" in capsys.readouterr().err
