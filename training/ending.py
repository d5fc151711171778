"""When a run has reached its end."""

from config import Config
from optimization.state import Progress
from training.build import total_epochs
from training.intervals import is_validated


def end_reached(config: Config, progress: Progress) -> str:
    """Why no epoch is to be trained after the one that was done last; empty if one is."""
    done, stop = progress.epoch, config.run.stop_at_epoch
    if done >= total_epochs(config):
        return f"{done} of {total_epochs(config)} epochs are done"
    if out_of_patience(config, progress):
        idle = done - progress.improved_epoch
        return f"early stop: no better {config.save.best_metric} for {idle} epochs"
    return f"--stop-at-epoch {stop}: {done} epochs are done" if stop and done >= stop else ""


def out_of_patience(config: Config, progress: Progress) -> bool:
    """Whether ``--early-stop`` ends a run here, at the end of an epoch with a validation."""
    here = not progress.samples and is_validated(config, progress.epoch)
    patience = config.save.early_stop if here else 0
    return patience > 0 and progress.epoch - progress.improved_epoch >= patience


def way_on(config: Config, progress: Progress) -> str:
    """What goes on with a run that has reached its end."""
    if progress.epoch >= total_epochs(config):
        return "a larger --epochs trains on, with the schedule of that length"
    if out_of_patience(config, progress):
        return "a larger --early-stop (0: none), another --best-metric or more --epochs train on"
    return "a larger --stop-at-epoch, or none, trains on"
