"""A run, and ``train``, which is one from Python."""

from training.api import Result, train

__all__ = ["Result", "train"]
