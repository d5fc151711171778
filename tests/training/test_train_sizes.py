"""training/train_sizes.py: smaller training images in early epochs, evaluation at the full size."""

import pytest
from runs import STOPPED, assert_same_state, logged, newest, stopped_after, train

import models
from config import resolve
from errors import OptionError
from training.train_sizes import summaries

SIZES = ("--input-size", "16", "--train-sizes", "8:0", "8x12:1", "16:2")


def test_training_sees_each_size_and_evaluation_the_full_one(images, tmp_path, monkeypatch):
    seen = []
    embed = models.DistilledVisionTransformer.embed

    def noted(self, x):
        if not x.is_meta:
            seen.append((self.training, *x.shape[-2:]))
        return embed(self, x)

    monkeypatch.setattr(models.DistilledVisionTransformer, "embed", noted)
    assert train(images, tmp_path, "--model", "deit_nano_distilled_patch4_32", *SIZES) == 0
    changes = [now for before, now in zip([None, *seen], seen, strict=False) if now != before]
    full = (False, 16, 16)
    assert changes == [(True, 8, 8), full, (True, 8, 12), full, (True, 16, 16), full]
    assert newest(tmp_path)["preprocessing"]["input_size"] == 16


def test_a_run_goes_on_exactly_in_a_later_phase(images, tmp_path):
    """Six updates an epoch, of which the last is the first stop; with images that are kept ready
    for crops, and with a worker."""
    options = (*SIZES, "--src", "--cache")
    assert train(images, tmp_path / "whole", *options, "none") == 0
    parts = tmp_path / "parts"
    for updates, more in (
        (6, ("ram",)),
        (9, ("none", "--num-workers", "1", "--resume", "auto")),  # up to update 15
    ):
        with stopped_after(updates):
            assert train(images, parts, *options, *more) == STOPPED
    assert train(images, parts, *options, "none", "--resume", "auto") == 0
    assert_same_state(newest(tmp_path / "whole"), newest(parts))
    assert logged(tmp_path / "whole") == logged(parts)


def test_what_does_not_fit_is_refused_before_training(images, tmp_path, capsys):
    for sizes, model, reason in (
        (["10:0"], "deit_nano_patch4_32", "don't tile"),
        (["3:0"], "deit_nano_patch4_32", "the image is smaller than its layers take"),
        (
            ["24:0"],
            "deit_nano_patch4_32",
            "24 is larger than the 16 of evaluation",
        ),
        (["8:0"], "resmlp_12_224", "8 doesn't fit"),
    ):
        argv = ["--model", model, "--input-size", "16", "--train-sizes", *sizes]
        assert train(images, tmp_path, *argv) == 2
        error = capsys.readouterr().err
        assert "--train-sizes" in error and reason in error
    assert not (tmp_path / "log.txt").exists()


def test_a_cache_that_later_sizes_cant_have_is_refused_before_training(images, tmp_path, capsys):
    sizes = ("--input-size", "40", "--train-sizes", "16:0", "40:1")
    options = ("--model", "test_resnet", *sizes, "--cache", "device")
    assert train(images, tmp_path, *options) == 2
    assert "--cache: device needs crops" in capsys.readouterr().err
    assert not (tmp_path / "log.txt").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (["128"], "is not SIZE:EPOCH"),
        (["0:0"], "is not SIZE:EPOCH"),
        (["128:1"], "says nothing of the first epoch"),
        (["128:0", "160:0"], "later than the one before"),
    ],
)
def test_odd_stages_are_refused(text, reason):
    with pytest.raises(OptionError, match=reason):
        resolve({"train_sizes": text})


def test_work_is_counted_at_each_size():
    config = resolve({"train_sizes": ["16:0", "16x32:1"], "input_size": 32})
    found = summaries(models.build_model("resnet18_cifar", 3, input_size=32), config, 3)
    assert list(found) == [(32, 32), (16, 16), (16, 32)]
    work = [summary.macs / found[32, 32].macs for summary in found.values()]
    assert work == pytest.approx([1, 1 / 4, 1 / 2], rel=0.01)
