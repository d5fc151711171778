"""A run from top to bottom: processes, data, model, criterion, state, then the epochs."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

import utils
from architectures.libraries import description
from augmentation.mixing import build_mixer
from checkpointing.folder import CONFIG_FILE
from config import Config, to_yaml
from distributed.environment import number
from distributed.processes import Processes, on_main_process
from distributed.rendezvous import joined
from errors import OptionError
from outputs.console import console
from training.agreement import (
    agree_on_data,
    agree_on_start,
    agree_on_weights,
    await_newest,
    recipe_terms,
    warn_of_versions,
)
from training.announce import announce_over, announce_start
from training.asked import asked_only
from training.batch_size import (
    out_of_memory_advice,
    probe,
    refuse_single_images,
    train_with_largest_batch,
)
from training.build import Parts, build_criterion, build_model, build_state, step_settings
from training.console import message_log, setup_messages
from training.data import build_data, build_sets
from training.early import check_names
from training.ending import end_reached
from training.evaluation import evaluate_checkpoint
from training.image_options import with_options_of_weights
from training.lock import RunLock
from training.plugins import import_plugins
from training.resume import (
    find_start,
    open_folder,
    output_folder,
    refuse_other_options,
    resume,
    settle,
    settle_best,
    start_at,
)
from training.signals import StopRequest
from training.train_sizes import summaries
from training.trainer import Trainer


def run(config: Config) -> int:
    """Train (or, with ``--eval``, evaluate) as ``config`` says; returns the exit code.

    Raises Stopped if a signal came before there was anything to save.
    """
    with (
        console(),
        StopRequest(config.run.stop_after) as stop,
        asked_only(config),
        joined(config.dist, config.run.device, partial(recipe_terms, config)) as processes,
    ):
        device = set_up_process(config, processes)
        warn_of_versions(processes)
        check_names(config)
        config = with_options_of_weights(config, output_folder(config))
        if config.run.eval:
            return evaluate_checkpoint(config, processes, device)
        if config.run.overfit_batches:
            config = overfitting(config)
        check_restarts(config)
        folder = output_folder(config)
        with (
            held_folder(config, processes, folder),
            message_log(folder),
            out_of_memory_advice(config, device),
        ):
            if config.data.batch_size != "auto":
                return train(config, processes, device, folder, stop)

            def attempt(chosen: Config) -> int:
                return train(chosen, processes, device, folder, stop, probing=True)

            return train_with_largest_batch(config, folder, processes, device, attempt)


def train(
    config: Config,
    processes: Processes,
    device: torch.device,
    folder: Path,
    stop: StopRequest,
    *,
    probing: bool = False,
) -> int:
    """Train into ``folder``; with ``probing``, raise BatchTooLarge first if a step doesn't fit."""
    if config.run.resume == "auto":
        await_newest(processes, folder, timeout=min(60.0, config.dist.dist_timeout / 2))
    start = find_start(config, folder)
    source, content = start or (None, {})
    agree_on_start(processes, source, content, scattered=config.dist.fsdp)
    if start:
        refuse_other_options(config, start)
    parts = assemble(config, processes, device, start.content if start else None)
    if start:
        resume(parts, folder, start)
    elif config.run.start_epoch:
        start_at(parts.state.progress, config.run.start_epoch, parts.data.updates_per_epoch(config))
    if probing:
        probe(parts)
    refuse_single_images(parts)
    if start:
        # From here on the folder changes.
        if over := end_reached(config, parts.state.progress):
            settle_best(parts, folder)
            announce_over(parts, folder, start.source, over)
            return 0
        settle(parts, folder)
    if processes.is_main:
        text = to_yaml(config)
        parts.outputs.write(folder / CONFIG_FILE, lambda path: utils.write_text(path, text))
    trainer = Trainer(parts, folder, start)
    announce_start(parts, folder)
    with stop.deferred():
        return trainer.fit(stop)


def assemble(
    config: Config,
    processes: Processes,
    device: torch.device,
    resumed: dict[str, Any] | None = None,
) -> Parts:
    """Data, model, criterion and state of a run.

    A run that is ``resumed`` from a checkpoint needs no weights to start from.
    """
    sets = build_sets(config, processes, resumed)
    parts = {"training": sets.train, "validation": sets.val}
    agree_on_data(processes, parts, config.data.data_path)
    utils.seed_all(config.run.seed)
    model, preprocessing = build_model(config, len(sets.class_names), device, resumed)
    agree_on_weights(processes, model.state_dict(), "start from")
    sizes = summaries(model, config, len(sets.class_names))
    summary = sizes[config.model.size]
    epoch = (resumed or {}).get("progress", {}).get("epoch", config.run.start_epoch)
    data = build_data(config, processes, sets, preprocessing, device, epoch)
    criterion = build_criterion(config, data, preprocessing, device)
    if config.loss.distillation_type != "none":
        agree_on_weights(processes, criterion.teacher.state_dict(), "have a teacher of")
    state, freezer = build_state(config, model, data, processes, device)
    return Parts(
        config=config,
        processes=processes,
        device=device,
        data=data,
        preprocessing=preprocessing,
        summary=summary,
        criterion=criterion,
        state=state,
        freezer=freezer,
        mixer=build_mixer(config.augment, len(data.class_names)),
        settings=step_settings(
            config, processes, device, data, model, macs=sizes[data.train_size].macs
        ),
        hub_config=(resumed or {}).get("hub_config") or description(config.model.model),
        summaries=sizes,
    )


def set_up_process(config: Config, processes: Processes) -> torch.device:
    """Messages, device, determinism and plug-ins of this process; returns the device."""
    setup_messages(processes, config.log.log_level)
    device = utils.pick_device(config.run.device, processes.local_rank)
    utils.set_determinism(config.run.deterministic)
    import_plugins(config.run.plugin)
    return device


def check_restarts(config: Config) -> None:
    """Raise OptionError if torchrun is to restart a run that would begin anew."""
    if number("TORCHELASTIC_MAX_RESTARTS", 0) and not config.run.resume:
        raise OptionError(
            "resume",
            "torchrun is to start this run again after a failure (--max-restarts): add "
            "--resume auto, so that it goes on",
        )


@contextmanager
def held_folder(config: Config, processes: Processes, folder: Path) -> Iterator[None]:
    """Inside, the run's folder is there and held by this run alone."""
    locks: list[RunLock] = []
    on_main_process(processes, lambda: locks.append(open_folder(config, folder)))
    try:
        yield
    finally:
        for lock in locks:
            lock.release()


def overfitting(config: Config) -> Config:
    """The sanity run of ``--overfit-batches``: nothing that keeps the loss from zero."""
    return config.replace(
        "--overfit-batches",
        mixup=0.0,
        cutmix=0.0,
        cutmix_minmax=None,
        smoothing=0.0,
        drop=0.0,
        drop_path=0.0,
        drop_block=None,
        repeated_aug=False,
        resplit=False,
        aug_splits=0,
        jsd_loss=False,
        reprob=0.0,
        cosub=False,
        sampler="shuffle",
        train_sizes=(),
    )
