"""config/metrics.py: what --best-metric may be called."""

import pytest

import config
from config.metrics import metric_key, metrics
from errors import OptionError


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("macro_f1", "test_macro_f1"),
        ("macro-f1", "test_macro_f1"),
        ("balanced_accuracy", "test_balanced_acc"),
        ("top1", "test_acc1"),
        ("ema_f1", "ema_macro_f1"),
        ("loss", "test_loss"),
        ("map", "test_map"),
        ("train_loss", "train_loss"),
        ("nonsense", "nonsense"),
    ],
)
def test_short_names_and_those_of_others(name, key):
    assert metric_key(name) == key


def test_a_run_keeps_the_log_key():
    run = config.load(["--monitor", "worst_class_acc", "--data-path", "x"])
    assert run.save.best_metric == "test_worst_class_acc"
    assert metrics("classification")[0] == "test_acc1"


def test_the_metric_is_that_of_the_task():
    with pytest.raises(OptionError, match="'test_map' is not logged; one of test_acc1, .*"):
        config.load(["--best-metric", "map", "--data-path", "x"])
    with pytest.raises(OptionError, match=r"did you mean test_balanced_acc\?"):
        config.load(["--best-metric", "balancd_acc", "--data-path", "x"])
