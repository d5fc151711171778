"""A run's folder, and going on from what is in it."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import utils
from checkpointing.files import class_names_of, load_checkpoint, weights_of
from checkpointing.folder import BEST, holds_run, load_newest, newer_checkpoints, set_best
from checkpointing.published import is_published
from config import Config
from distributed.processes import any_process, on_main_process
from errors import CheckpointError, OptionError
from optimization.state import Progress, check_same_weights
from training.build import Parts
from training.lock import RunLock

log = logging.getLogger(__name__)


def output_folder(config: Config) -> Path:
    """Where the run is written: ``--output-dir``, or ``output/MODEL-DATASET``."""
    if config.run.output_dir:
        return Path(config.run.output_dir).expanduser()
    name = f"{config.model.model}-{config.data.data_set}".replace("/", "-")
    return Path("output") / name


def open_folder(config: Config, folder: Path) -> RunLock:
    """Make the output directory and lock it; refuse one that holds a run, unless ``--resume``."""
    refuse_other_run(config, folder)
    make_writable(folder)
    return RunLock(folder)


def refuse_other_run(config: Config, folder: Path) -> None:
    """Raise OptionError if ``folder`` holds a run that ``--resume`` doesn't go on with."""
    resume = config.run.resume
    elsewhere = resume not in ("", "auto") and Path(resume).parent.resolve() != folder.resolve()
    if holds_run(folder) and (not resume or elsewhere):
        raise OptionError(
            "output_dir",
            f"{folder} already holds a run: add --resume auto to go on with it, choose another "
            "--output-dir, or remove it",
        )


def make_writable(folder: Path) -> None:
    """Make the folder if need be. Raises OptionError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OptionError(
            "output_dir", f"{folder} can't be written: {error.strerror}; choose another"
        ) from None


class Start(NamedTuple):
    """A checkpoint to go on from."""

    source: str
    """Its file or address."""
    content: dict[str, Any]


def find_start(config: Config, folder: Path) -> Start | None:
    """The checkpoint that ``--resume`` means; None where a run starts anew."""
    if config.run.resume == "auto":
        newest = load_newest(folder, scattered=config.dist.fsdp)
        if newest is None:
            log.info("nothing to resume in %s: starting anew", folder)
            return None
        path, content = newest
        return Start(str(path), content)
    if config.run.resume and is_published(config.run.resume):
        raise OptionError(
            "resume",
            f"{config.run.resume} is published, no run goes on from it: start from its weights "
            "with --model NAME --pretrained",
        )
    if config.run.resume:
        content = load_checkpoint(config.run.resume, scattered=config.dist.fsdp)
        return Start(config.run.resume, content)
    return None


def resume(parts: Parts, folder: Path, start: Start) -> None:
    """Put the state where the checkpoint was, and say what is not as it was.

    Raises CheckpointError if the checkpoint is of another model, optimiser or list of classes.
    """
    state, source, content = parts.state, *start
    _load_state(parts, content, source)
    if "rng" in content:
        utils.set_rng_state(content["rng"])
    _count_anew(parts)
    progress = state.progress
    here = f", {progress.samples} images into the next" if progress.samples else ""
    log.info("resumed %s: %d epochs done%s", source, progress.epoch, here)
    recipe = parts.config.recipe()
    for name, was in (content.get("config") or {}).items():
        if name in recipe and recipe[name] != was:
            log.info("  --%s is %s now, was %s", name.replace("_", "-"), recipe[name], was)
    without_best: list[bool] = []
    on_main_process(
        parts.processes, lambda: without_best.append(_settle_folder(folder, progress, source))
    )
    if any_process(any(without_best)):
        progress.best = progress.reference = None


def _load_state(parts: Parts, content: dict[str, Any], source: str) -> None:
    """Load the state, or raise CheckpointError with what is of another run."""
    saved_names = class_names_of(content)
    try:
        # The weights first: a new class count shows in their shapes.
        check_same_weights(parts.state.model, content.get("model") or weights_of(content))
        if saved_names is not None and saved_names != parts.data.class_names:
            raise CheckpointError(
                "it was trained on other classes; use --finetune to take its weights over"
            )
        opt = (content.get("config") or {}).get("opt", parts.config.optim.opt)
        if opt != parts.config.optim.opt:
            raise CheckpointError(
                f"it was written with --opt {opt}: resume with that, or start anew with --finetune"
            )
        parts.state.load_state_dict(content)
    except CheckpointError as error:
        raise CheckpointError(f"--resume {source}: {error}") from None


def _count_anew(parts: Parts) -> None:
    """Count updates and batches as this session has them, where it has others than the last."""
    config, progress = parts.config, parts.state.progress
    per_epoch = parts.data.updates_per_epoch(config)
    before = progress.updates_per_epoch, progress.batch_size, progress.world_size
    now = per_epoch, config.data.batch_size, parts.processes.world_size
    if config.run.start_epoch:
        start_at(progress, config.run.start_epoch, per_epoch)
    elif before != now:
        # The images seen stay seen; what is counted in batches starts anew behind them.
        share = progress.samples / parts.data.sampler.num_samples
        progress.update = round((progress.epoch + share) * per_epoch)
        progress.step = 0
        log.warning(
            "%d updates per epoch of batches of %d on %d process(es) now, %d of %d on %d before: "
            "no image of the epoch is skipped or repeated, but batches, dropout and rate differ "
            "from the first plan",
            *now,
            *before,
        )
    progress.updates_per_epoch, progress.batch_size, progress.world_size = now


def _settle_folder(folder: Path, progress: Progress, source: str) -> bool:
    """Make the folder agree with the checkpoint that a run goes on from.

    Checkpoints of a future that the run has gone back behind are put aside. Returns whether there
    is no ``best.pth`` any more that the run could have to beat.
    """
    place = (progress.epoch, progress.samples)
    newer = newer_checkpoints(folder, *place)
    best, path = folder / BEST, Path(source)
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
        set_best(folder, path)
    return not best.exists()


def _is_past(best: Path, progress: Progress) -> bool:
    try:
        return load_checkpoint(best)["progress"]["epoch"] <= progress.epoch
    except (CheckpointError, KeyError):
        return False


def start_at(progress: Progress, epoch: int, updates_per_epoch: int) -> None:
    """Count from ``--start-epoch``, at the beginning of that epoch."""
    progress.end_epoch()
    progress.epoch = epoch
    progress.update = epoch * updates_per_epoch
    if progress.best_epoch >= epoch:
        progress.best = progress.reference = None
