"""tools.lr_find: the range test, on a small CNN and real digits."""

import re

import numpy as np
import pytest
from before_training import SMALL
from PIL import Image

import config
import main as training
from errors import UserError
from optimization.optimizer import scaled_lr
from tools import lr_find
from tools.common.stage import Trial, single_process


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


def test_range_test_uses_the_rates_and_stops_where_the_loss_is_lost():
    with single_process(config.load([*SMALL, "--log-interval", "1"])) as (_, processes, device):
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
    assert rate == pytest.approx(scaled_lr(value, 32), rel=0.05)
    # A CNN with AdamW learns at such rates.
    assert 1e-5 < rate < 3e-2
    recipe = training.load_config(["--config", str(tmp_path / "out" / "lr.yaml")])
    want = training.load_config([*argv, "--lr", str(value)])
    assert recipe.recipe() == want.recipe()
    assert recipe.optim.weight_decay == 0.07 and recipe.optim.lr == value
    image = Image.open(tmp_path / "out" / "lr.png")
    assert image.size[0] > 600 and len(image.convert("L").getcolors()) > 10
