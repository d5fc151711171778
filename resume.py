"""A run's folder, and going on from what is in it."""

import logging
from pathlib import Path
from typing import Any

import checkpoint
import utils
from build import Data
from config import Config
from errors import CheckpointError, OptionError
from lock import RunLock
from state import Progress, TrainState, check_same_weights

log = logging.getLogger(__name__)


def output_folder(config: Config) -> Path:
    """Where the run is written: ``--output-dir``, or ``output/MODEL-DATASET``."""
    if config.run.output_dir:
        return Path(config.run.output_dir).expanduser()
    name = f"{config.model.model}-{config.data.data_set}".replace("/", "-")
    return Path("output") / name


def open_folder(config: Config, folder: Path) -> RunLock:
    """Make the output directory and lock it; refuse one that holds a run, unless ``--resume``."""
    resume = config.run.resume
    elsewhere = resume not in ("", "auto") and Path(resume).parent.resolve() != folder.resolve()
    if checkpoint.holds_run(folder) and (not resume or elsewhere):
        raise OptionError(
            "output_dir",
            f"{folder} already holds a run: add --resume auto to go on with it, choose another "
            "--output-dir, or remove it",
        )
    make_writable(folder)
    return RunLock(folder)


def make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OptionError(
            "output_dir", f"{folder} can't be written: {error.strerror}; choose another"
        ) from None


def find_start(config: Config, folder: Path) -> tuple[str, dict[str, Any]] | None:
    """The checkpoint to go on from, with its name."""
    if config.run.resume == "auto":
        latest = checkpoint.load_latest(folder, scattered=config.dist.fsdp)
        if latest is None:
            log.info("nothing to resume in %s: starting anew", folder)
            return None
        return str(latest[0]), latest[1]
    if config.run.resume:
        content = checkpoint.load_file(config.run.resume, scattered=config.dist.fsdp)
        return config.run.resume, content
    return None


def resume(
    state: TrainState,
    config: Config,
    data: Data,
    processes: utils.Processes,
    folder: Path,
    source: str,
    content: dict[str, Any],
) -> None:
    """Put ``state`` where the checkpoint was, and say what is not as it was."""
    saved_names = checkpoint.class_names_of(content)
    try:
        # The weights first: a new class count shows in their shapes.
        check_same_weights(state.model, content.get("model") or checkpoint.weights_of(content))
        if saved_names is not None and saved_names != data.class_names:
            raise CheckpointError(
                "it was trained on other classes; use --finetune to take its weights over"
            )
        opt = (content.get("config") or {}).get("opt", config.optim.opt)
        if opt != config.optim.opt:
            raise CheckpointError(
                f"it was written with --opt {opt}: resume with that, or start anew with --finetune"
            )
        state.load_state_dict(content)
    except CheckpointError as error:
        raise CheckpointError(f"--resume {source}: {error}") from None
    if "rng" in content:
        utils.set_rng_state(content["rng"])
    progress = state.progress
    per_epoch = data.updates_per_epoch(config)
    before = progress.updates_per_epoch, progress.batch_size, progress.world_size
    now = per_epoch, config.data.batch_size, processes.world_size
    if config.run.start_epoch:
        start_at(progress, config.run.start_epoch, per_epoch)
    elif before != now:
        # The pictures seen stay seen; what is counted in batches starts anew behind them.
        share = progress.samples / data.sampler.num_samples
        progress.update = round((progress.epoch + share) * per_epoch)
        progress.step = 0
        log.warning(
            "%d updates an epoch of batches of %d on %d process(es) now, %d of %d on %d before: no "
            "picture of the epoch is skipped or repeated, but batches, dropout and rate differ "
            "from the first plan", *now, *before,
        )  # fmt: skip
    progress.updates_per_epoch, progress.batch_size, progress.world_size = now
    here = f", {progress.samples} pictures into the next" if progress.samples else ""
    log.info("resumed %s: %d epochs done%s", source, progress.epoch, here)
    recipe = config.recipe()
    for name, was in (content.get("config") or {}).items():
        if name in recipe and recipe[name] != was:
            log.info("  --%s is %s now, was %s", name.replace("_", "-"), recipe[name], was)
    without_best: list[bool] = []
    utils.on_main_process(
        processes, lambda: without_best.append(_settle_folder(folder, progress, source))
    )
    if utils.any_process(any(without_best)):
        progress.best = progress.reference = None


def _settle_folder(folder: Path, progress: Progress, source: str) -> bool:
    """Make the folder agree with the checkpoint that a run goes on from.

    Checkpoints of a future that the run has gone back behind are put aside. Returns whether there
    is no ``best.pth`` any more that the run could have to beat.
    """
    place = (progress.epoch, progress.samples)
    newer = checkpoint.newer_in_folder(folder, *place)
    best, path = folder / checkpoint.BEST, Path(source)
    if best.exists() and not _is_past(best, progress):
        newer.append(best)
    if newer:
        aside = folder / "set-aside"
        aside.mkdir(exist_ok=True)
        for file in newer:
            file.replace(aside / file.name)
        log.warning("%d newer checkpoints were put into %s", len(newer), aside)
    is_best = place == (progress.best_epoch + 1, 0) and progress.best is not None
    if is_best and path.parent.resolve() == folder.resolve():
        # The run may have died between writing the checkpoint and naming it the best.
        checkpoint.set_best(folder, path)
    return not best.exists()


def _is_past(best: Path, progress: Progress) -> bool:
    try:
        return checkpoint.load_file(best)["progress"]["epoch"] <= progress.epoch
    except (CheckpointError, KeyError):
        return False


def start_at(progress: Progress, epoch: int, updates_per_epoch: int) -> None:
    """Count from ``--start-epoch``, at the beginning of that epoch."""
    progress.end_epoch()
    progress.epoch = epoch
    progress.update = epoch * updates_per_epoch
    if progress.best_epoch >= epoch:
        progress.best = progress.reference = None
