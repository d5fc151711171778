"""A run's folder, and going on from what is in it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import utils
from architectures.factory import resolve_name
from checkpointing.files import class_names_of, load_checkpoint, weights_of
from checkpointing.folder import (
    BEST,
    epochs_in,
    holds_run,
    load_newest,
    newer_checkpoints,
    set_best,
)
from checkpointing.form import check_options
from checkpointing.published import is_published
from config import (
    KEYWORD_OPTIONS,
    Config,
    all_options,
    by_name,
    on_resume,
    optimizer_name,
    value_text,
)
from distributed.processes import gather, on_main_process
from errors import CheckpointError, OptionError, UserError, first_line, first_names, printable
from loggers import LOG_FILE, read_log
from optimization.state import Progress, check_same_weights
from outputs.files import reason
from training.build import Parts
from training.ending import out_of_patience
from training.lock import RunLock

log = logging.getLogger(__name__)

_LOSS = {opt.name for opt in all_options() if opt.section == "loss"}


def output_folder(config: Config) -> Path:
    """Where the run is written: ``--output-dir``, or ``output/MODEL-DATASET``."""
    if config.run.output_dir:
        return Path(config.run.output_dir).expanduser()
    name = f"{config.model.model}-{config.data.data_set}".replace("/", "-")
    return Path("output") / name


def open_folder(config: Config, folder: Path) -> RunLock:
    """Make the output directory and lock it; refuse one that holds a run, unless ``--resume``."""
    make_writable(folder)
    refuse_other_run(config, folder)
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
        raise OptionError("output_dir", f"not writable: {reason(error, folder)}") from None


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
        check_options(path, content.get("config") or {})
        return Start(str(path), content)
    if config.run.resume and is_published(config.run.resume):
        raise OptionError(
            "resume",
            f"{config.run.resume} is published, no run goes on from it: start from its weights "
            "with --model NAME --pretrained",
        )
    if config.run.resume:
        content = load_checkpoint(config.run.resume, scattered=config.dist.fsdp)
        check_options(config.run.resume, content.get("config") or {})
        return Start(config.run.resume, content)
    return None


def refuse_other_options(config: Config, start: Start) -> None:
    """Raise OptionError if an option is not as in the checkpoint and can't be another one."""
    changed = _changed(config, start.content)
    if saved := start.content.get("config"):
        # What an older checkpoint doesn't name had its default.
        for name, now in config.recipe().items():
            default = by_name(name).default
            if name not in saved and now != (list(default) if default == () else default):
                changed[name] = now, default
    for name, (now, was) in changed.items():
        rule = on_resume(name)
        if rule.kind == "refused" and _plain_name(name, now) != _plain_name(name, was):
            flag = by_name(name).flag
            raise OptionError(
                name,
                f"{start.source} was written with {flag} {value_text(was) or 'none'}, and "
                f"{rule.note}: "
                f"resume with that, or start anew with --finetune {start.source} "
                "--output-dir ANOTHER",
            )


def _changed(config: Config, content: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The options that are not as in the checkpoint: what each is now, and what it was."""
    recipe, saved = config.recipe(), content.get("config") or {}
    return {k: (recipe[k], was) for k, was in saved.items() if k in recipe and recipe[k] != was}


def _plain_name(option: str, value: Any) -> Any:
    """``value`` without the choice of names that some options have for the same thing.

    A name in a foreign checkpoint may be a number.
    """
    if option in KEYWORD_OPTIONS:
        return sorted(value)
    if option == "opt":
        return optimizer_name(str(value))
    try:
        return resolve_name(str(value)) if option == "model" else value
    except OptionError:
        return value


def resume(parts: Parts, folder: Path, start: Start) -> None:
    """Put the state where the checkpoint was, and say what is not as it was.

    Nothing in the folder changes. What belonged to an option that is another one now starts anew.
    Raises CheckpointError if the checkpoint is of another model, optimiser or list of classes.
    """
    state, source, content = parts.state, *start
    _load_state(parts, content, source)
    changed = _changed(parts.config, content)
    _count_anew(parts, same_order=_same_order(parts, content, changed))
    progress = state.progress
    here = f", {progress.samples} images into the next" if progress.samples else ""
    log.info("resumed %s: %d epochs done%s", source, progress.epoch, here)
    for name, (now, was) in changed.items():
        log.info("  %s is %s now, was %s", by_name(name).flag, now, was)
    if "seed" in changed and parts.data.split["held_out"] is not None:
        log.info("  the images that were held out for validation stay the same")
    if state.ema and content.get("model_ema") is None:
        log.info("  the average of the weights starts from those of the checkpoint")
    if {"lr", "unscale_lr"} & changed.keys():
        state.schedule.restart()
        progress.rollbacks = 0
    if "best_metric" in changed:
        _count_best_anew(parts, folder)
    elif parts.config.save.best_metric == "train_loss" and _LOSS & changed.keys():
        progress.best = progress.reference = None
        progress.improved_epoch = progress.epoch
    _end_stop_of_shorter_run(parts.config, progress, changed)


def _load_state(parts: Parts, content: dict[str, Any], source: str) -> None:
    """Load the state, or raise CheckpointError with what is of another run."""
    saved_names = class_names_of(content)
    try:
        if saved_names is not None and saved_names != parts.data.class_names:
            raise CheckpointError(
                f"it was trained on other classes ({_differences(saved_names, parts)}); use "
                "--finetune to take its weights over"
            )
        check_same_weights(parts.state.model, content.get("model") or weights_of(content))
        # What may be odd in any way comes before what changes the model.
        if "rng" in content:
            utils.set_rng_state(content["rng"])
        parts.state.load_state_dict(content)
    except CheckpointError as error:
        raise CheckpointError(f"--resume {source}: {error}") from None
    except UserError:
        raise
    except Exception as error:  # a file from elsewhere may hold anything under these names
        reason = f"{type(error).__name__}: {printable(first_line(error))}"
        raise CheckpointError(
            f"--resume {source}: the state of its run isn't as this project writes it ({reason}); "
            "start from its weights with --finetune"
        ) from error


def _differences(saved: list[str], parts: Parts) -> str:
    """What the checkpoint's classes differ in from those of the data."""
    here, there = parts.data.class_names, set(saved)
    now = set(here)
    gone = [name for name in saved if name not in now]
    changes = {"gone": gone, "new": [name for name in here if name not in there]}
    texts = [f"{how}: {first_names(names, 3)}" for how, names in changes.items() if names]
    return "; ".join(texts) or "in another order"


def _same_order(
    parts: Parts, content: Mapping[str, Any], changed: Mapping[str, tuple[Any, Any]]
) -> bool:
    """Whether an epoch under way goes on with the images that it has not had yet; said if not."""
    before = (content.get("split") or {}).get("train", parts.data.split["train"])
    now = parts.data.split["train"]
    if before != now:
        log.warning("%d images to train on now, %d before", now, before)
    if before == now and not {"seed", "sampler", "repeated_aug"} & changed.keys():
        return True
    if content["progress"]["samples"]:
        log.warning("the epoch under way goes on in another order: images may come twice or not")
    return False


def _count_anew(parts: Parts, *, same_order: bool) -> None:
    """Count updates and batches as this session has them, where it has others than the last."""
    config, progress = parts.config, parts.state.progress
    per_epoch = parts.data.updates_per_epoch(config)
    images = parts.data.sampler.num_samples
    before = progress.updates_per_epoch, progress.batch_size, progress.world_size
    now = per_epoch, config.data.batch_size, parts.processes.world_size
    progress.samples = min(progress.samples, images)
    if config.run.start_epoch:
        start_at(progress, config.run.start_epoch, per_epoch)
    elif before != now:
        # The images seen stay seen; what is counted in batches starts anew behind them.
        progress.update = round((progress.epoch + progress.samples / images) * per_epoch)
        progress.step = 0
        log.warning(
            "%d updates per epoch of batches of %d on %d process(es) now, %d of %d on %d before: "
            "%sbatches, dropout and rate differ from the first plan",
            *now,
            *before,
            "no image of the epoch is skipped or repeated, but " if same_order else "",
        )
    progress.updates_per_epoch, progress.batch_size, progress.world_size = now


def _count_best_anew(parts: Parts, folder: Path) -> None:
    """Take the best score under another metric from what is there, and give it all patience.

    To be beaten is the best checkpoint that is still in the folder, so that ``best.pth`` is never
    a worse one; progress, for an early stop, is what is better than all epochs of the log.
    """
    metric, progress = parts.config.save.best_metric, parts.state.progress
    found: list[tuple[float | None, int, float | None]] = []
    if parts.processes.is_main:
        scores = _scores(folder, metric, progress.epoch)
        there = {*epochs_in(folder), _best_here(folder)[0]}
        kept = {epoch: score for epoch, score in scores.items() if epoch in there}
        best, best_epoch = _best_of(kept, lower=metric.endswith("loss"))
        found.append((best, best_epoch, _best_of(scores, lower=metric.endswith("loss"))[0]))
    progress.best, progress.best_epoch, progress.reference = gather(found)[0][0]
    progress.improved_epoch = progress.epoch
    parts.state.schedule.forget_metric()
    if progress.best is None:
        log.info("  no checkpoint has a %s yet: the best is counted from here on", metric)
    else:
        log.info(
            "  to be beaten: %s %.4f of epoch %d, the best that is still here",
            metric,
            progress.best,
            progress.best_epoch,
        )


def _scores(folder: Path, metric: str, epochs: int) -> dict[int, float]:
    """The scores of the first ``epochs`` epochs in the log, as far as it has them."""
    records = (r for r in read_log(folder / LOG_FILE) if r["epoch"] <= epochs)
    return {r["epoch"]: r[metric] for r in records if r.get(metric) is not None}


def _best_of(scores: Mapping[int, float], *, lower: bool) -> tuple[float | None, int]:
    """The best score and its epoch; None and 0 where there is none."""
    if not scores:
        return None, 0
    epoch = (min if lower else max)(scores, key=scores.__getitem__)
    return scores[epoch], epoch


def _end_stop_of_shorter_run(
    config: Config, progress: Progress, changed: Mapping[str, tuple[Any, Any]]
) -> None:
    """Give a run all patience again that an early stop ended and that is to be longer now."""
    longer = any(
        now > was for name, (now, was) in changed.items() if name in ("epochs", "cooldown_epochs")
    )
    if longer and out_of_patience(config, progress):
        progress.improved_epoch = progress.epoch
        log.info("  more epochs: the patience of --early-stop is counted from here on")


def settle(parts: Parts, folder: Path) -> None:
    """Make the folder agree with the checkpoint that the run goes on from.

    Checkpoints of a future that the run has gone back behind are put aside, and the best one is
    named.
    """
    on_main_process(parts.processes, lambda: _put_newer_aside(folder, parts.state.progress))
    settle_best(parts, folder)


def settle_best(parts: Parts, folder: Path) -> None:
    """Make ``best.pth`` the checkpoint of the best epoch, or count what it is as the best so far.

    A run may have ended before its best weights were written. Without a ``best.pth`` there is no
    score to beat.
    """
    progress, metric = parts.state.progress, parts.config.save.best_metric
    found: list[tuple[int, float | None]] = []

    def name_and_look() -> None:
        _name_best(folder, progress, metric)
        epoch, scores = _best_here(folder)
        found.append((epoch, scores.get(metric)))

    on_main_process(parts.processes, name_and_look)
    epoch, score = gather(found)[0][0]
    if not epoch:
        progress.best = progress.reference = None
        return
    older = epoch <= progress.epoch and epoch != progress.best_epoch
    if older and None not in (score, progress.best) and score != progress.best:
        log.warning(
            "the best weights, of epoch %d, were not written: to be beaten is %s %.4f of epoch %d",
            progress.best_epoch,
            metric,
            score,
            epoch,
        )
        progress.best, progress.best_epoch = score, epoch


def _put_newer_aside(folder: Path, progress: Progress) -> None:
    newer = newer_checkpoints(folder, progress.epoch, progress.samples)
    best = folder / BEST
    if best.exists() and not 0 < _best_here(folder)[0] <= progress.epoch:
        newer.append(best)
    if newer:
        aside = folder / "set-aside"
        aside.mkdir(exist_ok=True)
        for file in newer:
            file.replace(aside / file.name)
        log.warning("%d newer checkpoints were put into %s", len(newer), aside)


def _name_best(folder: Path, progress: Progress, metric: str) -> None:
    """Make ``best.pth`` the checkpoint of the best epoch, where it isn't and that one is there.

    A run may have died between writing a checkpoint and naming it the best.
    """
    own = epochs_in(folder).get(progress.best_epoch)
    if own is None or progress.best is None:
        return
    epoch, scores = _best_here(folder)
    if epoch <= progress.epoch and scores.get(metric) != progress.best:
        set_best(folder, own)


def _best_here(folder: Path) -> tuple[int, Mapping[str, Any]]:
    """The epochs done and the scores of ``best.pth``; 0 and none where it can't be read."""
    try:
        content = load_checkpoint(folder / BEST, weights=False)
        return content["progress"]["epoch"], content.get("metrics") or {}
    except (CheckpointError, KeyError):
        return 0, {}


def start_at(progress: Progress, epoch: int, updates_per_epoch: int) -> None:
    """Count ``epoch`` epochs as done, as ``--start-epoch`` says."""
    progress.end_epoch()
    progress.epoch = epoch
    progress.update = epoch * updates_per_epoch
    progress.improved_epoch = min(progress.improved_epoch, epoch)
    if progress.best_epoch > epoch:
        progress.best = progress.reference = None
