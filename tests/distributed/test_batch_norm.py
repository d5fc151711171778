"""Batch norm over all processes."""

import pytest
from runs import PLAIN, assert_close, train_together


def test_synchronised_batch_norm_equals_one_process_of_twice_the_batch(images, tmp_path):
    options = ("--epochs", "2", "--opt", "sgd", "--no-model-ema", *PLAIN)
    options += ("--model", "simple_cnn")
    one = train_together(images, tmp_path / "one", *options, "--batch-size", "8", world=1)
    two = train_together(images, tmp_path / "two", *options, "--batch-size", "4", "--sync-bn")
    assert_close(one, two)
    apart = train_together(images, tmp_path / "apart", *options, "--batch-size", "4")
    with pytest.raises(AssertionError):
        assert_close(one, apart)
