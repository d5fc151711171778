"""A loss or gradient that is not finite: stop, skip, roll back, and what is said of it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from runs import PLAIN, STOPPED, assert_same_state, logged, newest, stopped_after, train
from torch import nn

from checkpointing.folder import checkpoints_in

HALVINGS = 5  # so many rollbacks, then the run gives up


class Fragile(nn.Module):
    """A linear classifier that gives NaN for a batch with an image that is white in the middle."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Flatten()
        self.norm = nn.Identity()
        self.head = nn.Linear(3 * 8 * 8, num_classes)
        self.num_classes = num_classes

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        white = (x[:, :, 3:5, 3:5].amin((1, 2, 3)) > 0.99).any() & self.training
        return self.head(self.norm(self.body(x) * torch.where(white, float("nan"), 1.0)))


class Overflowing(nn.Module):
    """A linear classifier that multiplies its way through 1e5, where float16 ends at 65504."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1)) * 1e5 / 1e5


class Faltering(nn.Module):
    """A linear classifier whose 11th update gives NaN, unless it is made in full precision."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, num_classes)
        self.register_buffer("updates", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.updates += self.training
        bad = self.training and self.updates == 11 and torch.is_autocast_enabled("cpu")
        return self.head(x.flatten(1)) * (float("nan") if bad else 1.0)


@pytest.fixture(scope="module", autouse=True)
def models() -> None:
    """The models of this file are in timm's registry."""

    @timm.models.register_model
    def fragile(pretrained: bool = False, num_classes: int = 1000, **kwargs) -> nn.Module:
        return Fragile(num_classes)

    @timm.models.register_model
    def fragile_norm(pretrained: bool = False, num_classes: int = 1000, **kwargs) -> nn.Module:
        model = Fragile(num_classes)
        model.norm = nn.BatchNorm1d(3 * 8 * 8)
        return model

    @timm.models.register_model
    def overflowing(pretrained: bool = False, num_classes: int = 1000, **kwargs) -> nn.Module:
        return Overflowing(num_classes)

    @timm.models.register_model
    def faltering(pretrained: bool = False, num_classes: int = 1000, **kwargs) -> nn.Module:
        return Faltering(num_classes)


@pytest.fixture(scope="module")
def white_image(tmp_path_factory, images) -> Path:
    """The images, one of the training set wholly white."""
    root = tmp_path_factory.mktemp("white")
    shutil.copytree(images, root, dirs_exist_ok=True)
    Image.new("RGB", (14, 12), (255, 255, 255)).save(root / "train" / "blue" / "3.png")
    return root


FRAGILE = (*PLAIN, "--model", "fragile", "--mean", "0", "--std", "1", "--hflip", "0", "--src")


@pytest.mark.parametrize("opt", ["adamw", "lamb"])
def test_stop_names_step_rate_and_layer(white_image, tmp_path, capsys, opt):
    assert train(white_image, tmp_path, *FRAGILE, "--opt", opt) == 3
    error = capsys.readouterr().err
    where = re.search(r"update (\d+) \(epoch 1, step (\d+)\), learning rate ([\d.e-]+)", error)
    assert where and int(where[1]) == int(where[2]) - 1 and float(where[3]) > 0
    assert "the output of norm (Identity)" in error
    assert not checkpoints_in(tmp_path)


def test_stop_lists_the_images(white_image, tmp_path):
    assert train(white_image, tmp_path, *FRAGILE, "--accum-steps", "2") == 3
    report = json.loads((tmp_path / "nonfinite-rank0.json").read_text())
    assert report["first_nonfinite"] == "the output of norm (Identity)"
    assert len(report["images"]) == 8
    assert any(p.endswith("blue/3.png") for p in report["images"])


@pytest.mark.parametrize("opt", ["adamw", "lamb"])
def test_skip_leaves_out_one_update_per_epoch(white_image, tmp_path, opt):
    assert train(white_image, tmp_path, *FRAGILE, "--on-nonfinite", "skip", "--opt", opt) == 0
    content = newest(tmp_path)
    assert content["progress"]["skipped"] == 3
    assert content["progress"]["update"] == 18
    assert all(torch.isfinite(v).all() for v in content["model"].values())
    assert logged(tmp_path)[-1]["skipped_updates"] == 3


def test_a_skipped_update_is_named_and_leaves_statistics_alone(white_image, tmp_path):
    options = (*FRAGILE, "--model", "fragile_norm", "--on-nonfinite", "skip", "--epochs", "1")
    assert train(white_image, tmp_path, *options, "--warmup-epochs", "0") == 0
    content = newest(tmp_path)
    assert content["progress"]["skipped"] == 1
    for name in ("model", "model_ema"):
        assert all(torch.isfinite(v).all() for v in content[name].values())
    report = json.loads((tmp_path / "nonfinite-rank0.json").read_text())
    assert len(report["images"]) == 4
    assert any(p.endswith("blue/3.png") for p in report["images"])


def test_rollback_to_full_precision_overcomes_an_overflow(images, tmp_path, capsys):
    options = (*PLAIN, "--model", "overflowing", "--amp", "fp16", "--on-nonfinite", "rollback")
    options += ("--rollback-fp32-steps", "100", "--no-model-ema")
    assert train(images, tmp_path, *options) == 0
    assert "in full precision for 100 updates" in capsys.readouterr().out
    assert newest(tmp_path)["progress"]["rollbacks"] == 1


def test_rollback_halves_the_rate_and_gives_up_in_the_end(white_image, tmp_path, capsys):
    assert train(white_image, tmp_path, *FRAGILE, "--on-nonfinite", "rollback") == 3
    shown = capsys.readouterr()
    factors = re.findall(r"rate times ([\d.]+)", shown.out)
    assert [float(f) for f in factors] == [0.5**k for k in range(1, HALVINGS + 1)]
    assert "not finite" in shown.err


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("stops", [(8,), (7, 2), (10,), (13,)], ids=str)
def test_a_stop_leaves_a_later_rollback_where_it_was(images, tmp_path, faltering, stops, keep):
    """What a signal asked for is neither gone back to nor counted among those that are kept."""
    options, whole = (*faltering[0], "--keep", str(keep)), faltering[1]
    for updates in stops:  # of the session
        with stopped_after(updates):
            assert train(images, tmp_path / "parts", *options, "--resume", "auto") == STOPPED
    assert train(images, tmp_path / "parts", *options, "--resume", "auto") == 0
    assert_same_state(newest(whole), newest(tmp_path / "parts"))
    assert logged(whole) == logged(tmp_path / "parts")
    left = [path.name for path in checkpoints_in(tmp_path / "parts")]
    assert left == [path.name for path in checkpoints_in(whole)][:keep]


@pytest.fixture(scope="module")
def faltering(images, tmp_path_factory) -> tuple[tuple[str, ...], Path]:
    """The options and the folder of a whole run that goes back from update 11 to 6."""
    options = (*PLAIN, "--model", "faltering", "--amp", "bf16", "--on-nonfinite", "rollback")
    options += ("--rollback-fp32-steps", "100")
    folder = tmp_path_factory.mktemp("faltering")
    assert train(images, folder, *options) == 0
    assert newest(folder)["progress"]["rollbacks"] == 1
    return options, folder
