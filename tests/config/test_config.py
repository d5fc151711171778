"""The resolved options: precedence, origins, copies."""

from pathlib import Path

import pytest

from config import (
    CHECKPOINT,
    COMMAND_LINE,
    DEFAULT,
    FITTED,
    all_options,
    from_flat,
    load,
    resolve,
    to_yaml,
)
from errors import OptionError


def test_precedence_and_origins(write_yaml):
    write_yaml("lr: 0.1\nepochs: 11\nseed: 1\n", "base.yaml")
    middle = write_yaml("base: ../base.yaml\nepochs: 12\nseed: 2\n", "sub/middle.yaml")
    top = write_yaml("base: sub/middle.yaml\nseed: 3\nbatch-size: 7\n", "top.yaml")
    c = load(["--config", top, "--batch_size", "8"], lambda given: {"lr": 0.7, "momentum": 0.5})
    assert (c.optim.lr, c.run.epochs, c.run.seed, c.data.batch_size) == (0.1, 12, 3, 8)
    assert c.optim.momentum == 0.5 and c.origin["momentum"] == CHECKPOINT
    assert c.origin["lr"].endswith("base.yaml")
    assert Path(c.origin["epochs"]).samefile(middle) and c.origin["seed"] == top
    assert c.origin["batch_size"] == COMMAND_LINE and c.origin["opt"] == DEFAULT
    assert {"lr", "epochs", "seed", "batch_size", "momentum", "config"} == c.explicit()


def test_checkpoint_options_get_what_was_given(write_yaml):
    path = write_yaml("seed: 3\n")
    seen = {}
    load(["--config", path, "--resume", "x.pth"], lambda given: seen.update(given) or {})
    assert seen["seed"] == 3 and seen["resume"] == "x.pth" and "lr" not in seen


def test_resolve_leaves_what_was_given_as_it_was():
    given = {"lr": 0.5}
    c = resolve(given, lambda above: {"seed": 4})
    assert (c.optim.lr, c.run.seed) == (0.5, 4) and given == {"lr": 0.5}


def test_replace_checks_again():
    c = load([]).replace("here", lr=0.5)
    assert c.optim.lr == 0.5 and c.origin["lr"] == "here" and c.origin["opt"] == DEFAULT
    with pytest.raises(OptionError, match="--bce-loss"):
        c.replace("here", bce_loss=True)


def test_defaults_that_a_saved_config_spells_out_are_not_explicit(write_yaml):
    path = write_yaml(to_yaml(load(["--ThreeAugment", "--lr", "0.1"])))
    again = load(["--config", path])
    assert again.explicit() == {"config", "ThreeAugment", "lr"}


def test_a_warm_up_that_nobody_asked_for_fits_a_short_run(write_yaml):
    for epochs, warmup in ((300, 5), (10, 5), (9, 1.8), (5, 1), (1, 0.2)):
        c = load(["--epochs", str(epochs)])
        assert c.schedule.warmup_epochs == warmup
        assert c.origin["warmup_epochs"] == (DEFAULT if warmup == 5 else FITTED)
    assert load(["--epochs", "9", "--warmup-epochs", "5"]).schedule.warmup_epochs == 5
    # A recipe's warm-up is for the recipe's epochs.
    recipe = write_yaml("epochs: 60\nwarmup_epochs: 20\n")
    for epochs, warmup in ((60, 20), (40, 20), (30, 6), (20, 4)):
        c = load(["--config", recipe, "--epochs", str(epochs)])
        assert c.schedule.warmup_epochs == warmup
    # What was fitted once is saved, and stays.
    again = load(["--config", write_yaml(to_yaml(load(["--epochs", "5"])))])
    assert again.schedule.warmup_epochs == 1


def test_a_warm_up_that_was_asked_for_is_refused_where_it_does_not_fit(write_yaml):
    both = write_yaml("epochs: 5\nwarmup_epochs: 5\n")
    for line in (["--epochs", "5", "--warmup-epochs", "5"], ["--config", both]):
        with pytest.raises(OptionError, match="--warmup-epochs: 5 leaves nothing of --epochs 5"):
            load(line)


def test_flat_options_make_the_same_config():
    c = load(["--scale", "0.2", "0.9", "--sched", "poly", "--output-dir", "x"])
    assert list(c.flat()) == [opt.name for opt in all_options()]
    assert c.flat()["scale"] == [0.2, 0.9]
    assert from_flat(c.flat(), c.origin) == c
    assert set(c.flat()) - set(c.recipe()) == {opt.name for opt in all_options() if opt.transient}
