"""Which epochs end with a validation: ``--val-interval``."""

from config import Config
from training.build import total_epochs


def is_validated(config: Config, epoch: int) -> bool:
    """Whether ``epoch``, counted from 1, ends with a validation.

    It follows from the options alone. So a run that is stopped and resumed, also by
    ``--stop-at-epoch``, validates after the same epochs as one that isn't.
    """
    return epoch % config.run.val_interval == 0 or epoch == total_epochs(config)


def validations(config: Config, done: int, end: int) -> int:
    """Number of validations after epoch ``done`` and up to epoch ``end``, counted from 1."""
    return sum(is_validated(config, epoch) for epoch in range(done + 1, end + 1))


def epochs_since(config: Config, epoch: int) -> int:
    """Epochs from the last validation before ``epoch`` to it, both counted from 1."""
    interval = config.run.val_interval
    return epoch - (epoch - 1) // interval * interval
