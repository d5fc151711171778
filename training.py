"""The story of a run: processes, folder, data, model, criterion, state, epochs."""

from pathlib import Path

import torch

import utils
from build import build_criterion, build_data, build_model, build_state
from config import Config, to_yaml
from evaluation import evaluate_checkpoint
from lock import RunLock
from resume import find_start, open_folder, output_folder, resume, start_at
from trainer import Trainer

CONFIG_FILE = "config.yaml"


def run(config: Config) -> int:
    """Train (or, with ``--eval``, evaluate) as ``config`` says; returns the exit code."""
    processes = utils.init_distributed(config.dist, config.run.device)
    utils.setup_messages(processes)
    device = utils.pick_device(config.run.device, processes.local_rank)
    utils.set_determinism(config.run.deterministic)
    utils.import_plugins(config.run.plugin)
    if config.run.eval:
        return evaluate_checkpoint(config, processes, device)
    if config.run.overfit_batches:
        config = _overfitting(config)

    folder = output_folder(config)
    locks: list[RunLock] = []
    utils.on_main_process(processes, lambda: locks.append(open_folder(config, folder)))
    try:
        return _train(config, processes, device, folder)
    finally:
        for lock in locks:
            lock.release()


def _train(config: Config, processes: utils.Processes, device: torch.device, folder: Path) -> int:
    """The story of a training run, into ``folder``."""
    start = find_start(config, folder)
    data = build_data(config, processes)
    utils.seed_all(config.run.seed)
    resumed = start[1] if start else None
    model, preprocessing = build_model(config, len(data.class_names), device, resumed)
    data.set_transforms(config, preprocessing)
    criterion = build_criterion(config, data, preprocessing, device)
    state, freezer = build_state(config, model, data, processes, device)
    if start is not None:
        resume(state, config, data, processes, folder, *start)
    elif config.run.start_epoch:
        start_at(state.progress, config.run.start_epoch, data.updates_per_epoch(config))
    if processes.is_main:
        (folder / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")

    bad_images = resumed.get("bad_images", ()) if resumed else ()
    trainer = Trainer(
        config,
        processes,
        folder,
        data,
        preprocessing,
        criterion,
        state,
        freezer,
        device,
        bad_images,
    )
    trainer.introduce()
    with utils.StopRequest() as stop:
        return trainer.fit(stop)


def _overfitting(config: Config) -> Config:
    """The sanity run of ``--overfit-batches``: nothing that keeps the loss from zero."""
    return config.replace(
        "--overfit-batches",
        mixup=0.0, cutmix=0.0, cutmix_minmax=None, smoothing=0.0, drop=0.0, drop_path=0.0,
        drop_block=None, repeated_aug=False, resplit=False, reprob=0.0, cosub=False,
        sampler="shuffle",
    )  # fmt: skip
