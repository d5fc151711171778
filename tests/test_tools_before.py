"""What one does before training: lr_find, doctor, overfit, on a small CNN and real digits."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import config
import main as training
import optim
from errors import UserError
from tools import doctor, lr_find, overfit
from tools.stage import Rates, Trial, single_process

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    *("--data-set", "DIGITS", "--model", "simple_cnn", "--input-size", "16", "--device", "cpu"),
    *("--num-workers", "0", "--no-repeated-aug", "--aa", "none", "--color-jitter", "none"),
    *("--mixup", "0", "--cutmix", "0", "--reprob", "0", "--hflip", "0", "--warmup-epochs", "0"),
    *("--lr", "3e-3", "--unscale-lr", "--epochs", "2", "--no-tensorboard"),
]
PLUGIN = """
import itertools
import numpy as np
from datasets import ArraySource, register_dataset


class Changing(ArraySource):
    turn = itertools.count()

    def read(self, index):
        return self.images[index], next(self.turn) % 3


def source(images, targets, kind=ArraySource):
    return kind(images, targets, ["a", "b", "c"], "made")


@register_dataset("constant")
def constant(is_train, options, seed):
    return source(np.full((24, 16, 16), 100, np.uint8), np.arange(24) % 3)


@register_dataset("changing")
def changing(is_train, options, seed):
    images = np.random.default_rng(0).integers(0, 255, (24, 16, 16)).astype(np.uint8)
    return source(images, np.arange(24) % 3, Changing)


@register_dataset("torn")
def torn(is_train, options, seed):
    images = np.random.default_rng(0).integers(0, 255, (12, 16, 16)).astype(np.uint8)
    return source(np.concatenate([images, images]), np.arange(24) // 12)
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "made_for_tools.py"
    path.write_text(PLUGIN)
    return path


# --- the range test -------------------------------------------------------------------------------


def test_rates_rise_by_the_same_factor_and_keep_the_scale_of_groups():
    rates = Rates(1e-6, 1e-2, 5)
    assert [rates.rate(t) for t in range(5)] == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    groups = [{"params": weights[:1], "lr_scale": 0.5}, {"params": weights[1:]}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    rates.apply(optimizer, 2)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([5e-5, 1e-4])
    assert rates.last == pytest.approx(1e-4)


def curve(noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Falls fastest at 1e-3, lowest about 3e-2, then rises."""
    rates = np.geomspace(1e-6, 1, 301)
    x = np.log10(rates)
    losses = 2.3 - 1 / (1 + np.exp(-3 * (x + 3))) + 3 * np.clip(x + 1.5, 0, None) ** 2
    return rates, losses + noise * np.random.default_rng(0).normal(size=len(rates))


@pytest.mark.parametrize("noise", (0.0, 0.1))
def test_suggestion_is_at_the_steepest_place_and_a_tenth_of_the_minimum(noise):
    rates, losses = curve(noise)
    found = lr_find.suggest(rates, losses)
    clean = curve(0)[1]
    assert abs(np.log10(found.steepest) - -3) < (0.3 if noise else 0.05)
    lowest = rates[clean.argmin()]
    assert abs(np.log10(found.tenth * 10 / lowest)) < (0.4 if noise else 0.25)


def test_no_suggestion_from_noise():
    rates = np.geomspace(1e-6, 1, 300)
    for seed in range(20):
        losses = 2.3 + 0.1 * np.random.default_rng(seed).normal(size=300)
        with pytest.raises(UserError, match="doesn't fall at any rate"):
            lr_find.suggest(rates, losses)


def test_a_trial_goes_on_from_epoch_to_epoch_and_stops_at_its_update():
    given = config.load([*SMALL, "--batch-size", "256"])
    with single_process(given) as (processes, device):
        trial = Trial(given, processes, device)
        for updates in (7, 2):
            trial.train(updates)
    progress = trial.state.progress
    assert trial.data.steps == 5 and progress.update == 9
    assert (progress.epoch, progress.step, progress.samples) == (1, 4, 4 * 256)


def test_range_test_uses_the_rates_and_stops_where_the_loss_is_lost():
    with single_process(config.load([*SMALL, "--log-interval", "1"])) as (processes, device):
        trial = Trial(config.load([*SMALL, "--log-interval", "1"]), processes, device)
        rates, losses = lr_find.range_test(trial, 1e-4, 1e4, 60)
    assert np.allclose(rates, 1e-4 * (1e8) ** (np.arange(len(rates)) / 59))
    assert 10 < len(rates) < 60 and len(losses) == len(rates)
    assert losses[0] == pytest.approx(np.log(10), abs=0.4)


def test_lr_find_writes_a_recipe_in_the_units_of_the_option(tmp_path, capsys):
    """With --lr scaled by the batch, the value times batch / 512 is the rate that was found."""
    (tmp_path / "mine.yaml").write_text("weight_decay: 0.07\nlr: 0.5\n")
    argv = [a for a in SMALL if a != "--unscale-lr"]
    argv[argv.index("--lr") : argv.index("--lr") + 2] = ["--config", str(tmp_path / "mine.yaml")]
    argv += ["--batch-size", "32", "--output-dir", str(tmp_path / "out")]
    assert lr_find.main([*argv, "--updates", "70", "--from", "1e-5"]) == 0
    said = capsys.readouterr().out
    value = float(re.search(r"suggested \(steepest\): --lr (\S+),", said)[1])
    rate = float(re.search(r"a rate of (\S+) \(× 32 / 512\)", said)[1])
    assert rate == pytest.approx(optim.scaled_lr(value, 32), rel=0.05)
    # A CNN with AdamW learns at such rates.
    assert 1e-5 < rate < 3e-2
    recipe = training.load_config(["--config", str(tmp_path / "out" / "lr.yaml")])
    want = training.load_config([*argv, "--lr", str(value)])
    assert recipe.recipe() == want.recipe()
    assert recipe.optim.weight_decay == 0.07 and recipe.optim.lr == value
    image = Image.open(tmp_path / "out" / "lr.png")
    assert image.size[0] > 600 and len(image.convert("L").getcolors()) > 10


# --- overfit --------------------------------------------------------------------------------------


def overfitted(capsys, *argv: str) -> tuple[int, str]:
    code = overfit.main([*SMALL, "--batch-size", "8", "--most-updates", "60", *argv])
    return code, capsys.readouterr().out


def test_a_sound_model_learns_by_heart(capsys):
    code, said = overfitted(capsys, "--drop-path", "0", "--smoothing", "0.1")
    assert code == 0 and "fine: " in said and said.startswith("8 pictures")


def test_a_rate_too_low_is_shown_by_a_higher_one(capsys):
    code, said = overfitted(capsys, "--lr", "1e-6")
    assert code == 1
    assert re.search(r"broken: learning rate too low\. With lr: 0\.00\d+ alone the loss", said)
    assert "too high" not in said and "broken: input" not in said


def test_a_frozen_model_is_shown_by_a_free_one(capsys):
    freeze = ("--freeze", "*", "--unfreeze-at", "0:*.bias")
    code, said = overfitted(capsys, "--lr", "1e-3", *freeze)
    assert code == 1 and "broken: frozen model. With freeze: none" in said


def test_a_loss_that_teaches_nothing_is_shown_by_another(capsys):
    code, said = overfitted(capsys, "--loss", "focal", "--focal-gamma", "60")
    assert code == 1 and "broken: loss. With loss: ce" in said


@pytest.mark.parametrize(
    "name, words",
    (
        ("constant", "input: all 8 pictures are the same after preprocessing"),
        ("changing", "labels: 8 of 8 pictures have another label each time they are read (made#"),
        ("torn", "pictures are there under more than one label"),
    ),
)
def test_broken_data_is_named_with_evidence(plugin, capsys, name, words):
    argv = ("--data-set", name, "--plugin", str(plugin))
    if name == "torn":
        argv += ("--overfit-batches", "3")
    code, said = overfitted(capsys, *argv, "--most-updates", "25")
    assert code == 1 and "broken: " in said and words in said
    # Nothing else is tried where the data is to blame.
    assert said.count("broken") == 1 and "learning rate" not in said


# --- doctor ---------------------------------------------------------------------------------------


def test_doctor_is_ready_and_leaves_nothing_behind(tmp_path, capsys):
    folder = tmp_path / "runs" / "one"
    assert doctor.main([*SMALL, "--output-dir", str(folder), "--batch-size", "16"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "ready" and "skipped" not in said and "to fix" not in said
    for name in doctor.CHECKS:
        assert re.search(rf"^{name} +ok ", said, re.M)
    assert "train: 1438 pictures, 10 classes" in said and "89 steps an epoch" in said
    assert list(tmp_path.iterdir()) == []


def test_doctor_goes_on_where_a_check_fails(tmp_path, capsys, monkeypatch):
    (tmp_path / "log.txt").touch()
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(
        doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100_000})
    )
    argv = [*SMALL, "--output-dir", str(tmp_path), "--num-workers", "1", "--batch-size", "16"]
    assert doctor.main(argv) == 2
    said = capsys.readouterr().out
    assert "3 to fix:" in said
    for line in ("shared memory: 0.00 GiB free", "already holds a run", "disk: 0.00 GiB free"):
        assert line in said.partition("to fix:")[2]
    assert re.search(r"^training +ok ", said, re.M) and re.search(r"^checkpoint +ok ", said, re.M)
    assert [p.name for p in tmp_path.iterdir()] == ["log.txt"]


def test_doctor_names_what_cannot_be_checked(tmp_path, capsys):
    argv = [*SMALL, "--data-set", "IMNET", "--data-path", str(tmp_path / "no")]
    assert doctor.main([*argv, "--output-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert re.search(r"^training +skipped +needs data and model", said, re.M)
    assert "data: --data-path: " in said and "does not exist" in said


def test_doctor_finds_damage_in_the_data_and_on_the_disk(tmp_path, capsys, monkeypatch):
    for part in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "p" / part / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (16, 16), (i * 20, 0, 0)).save(folder / f"{i}.png")
    (tmp_path / "p/train/b/2.png").write_bytes(b"?")
    load = checkpoint.load_file

    def flipped(path):
        content = load(path)
        content["model"] = {k: v + 1 for k, v in content["model"].items()}
        return content

    monkeypatch.setattr(checkpoint, "load_file", flipped)
    monkeypatch.setattr("state.TrainState.load_state_dict", lambda self, content: None)
    argv = [*SMALL, "--data-set", "IMNET", "--data-path", str(tmp_path / "p"), "--batch-size", "2"]
    assert doctor.main([*argv, "--output-dir", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().out.partition("to fix:")[2]
    assert "1 of 16 pictures can't be read" in said and "b/2.png" in said
    assert "read back otherwise than written" in said


def test_tools_refuse_what_only_a_run_can_do(capsys):
    for tool in (doctor, overfit, lr_find):
        assert tool.main([*SMALL, "--batch-size", "auto"]) == 2
        assert "error: --batch-size: auto" in capsys.readouterr().err
        assert tool.main([*SMALL, "--no-such-option"]) == 2
        assert "unknown option --no-such-option" in capsys.readouterr().err
