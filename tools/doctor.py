"""A dry run: would this training work here?

    python -m tools.doctor --config configs/quickstart.yaml

Takes the options of main.py and checks the machine, shared memory, the output directory, the data,
a few training steps, an evaluation, a save and a load, memory, disk space and time. A check that
fails doesn't keep the others from running. Ends with "ready" (exit code 0) or the list of what is
to be mended (exit code 2). Nothing is left behind.
"""

import argparse
import contextlib
import dataclasses
import itertools
import math
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

import checkpoint
import datasets
import engine
import utils
from config import Config
from errors import UserError
from loggers import duration
from resume import make_writable, output_folder
from tools import command
from tools.stage import Trial, single_process
from trainer import versions

SHARED_MEMORY = Path("/dev/shm")
LOOKED_AT = 32  # pictures of each part that are read, evenly spread
TIMED = 3  # updates, after a first one
GIB = 2**30


class Skip(Exception):
    """A check that can't be made; the message says what it needs."""


@dataclasses.dataclass
class Patient:
    """The run, and what the checks before have found out about it."""

    config: Config
    processes: utils.Processes
    device: torch.device
    folder: Path
    trial: Trial | None = None
    checkpoint_bytes: int = 0
    seconds_per_update: float = 0.0
    evaluation_seconds: float = 0.0

    def needs_trial(self) -> Trial:
        if self.trial is None:
            raise Skip("data and model")
        return self.trial


# Each check yields lines to show, raises UserError for what is to be mended.
Check = Callable[[Patient], Iterator[str]]


def check_environment(patient: Patient) -> Iterator[str]:
    """Versions, machine and device."""
    found = versions() | {"python": platform.python_version()}
    yield ", ".join(f"{name} {version}" for name, version in found.items())
    yield f"{platform.platform()}, {os.cpu_count()} cores, device {patient.device}"
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        yield f"cuda:{number} {gpu.name}, {gpu.total_memory / GIB:.0f} GiB"
    if patient.config.run.device == "auto" and patient.device.type == "cpu":
        yield "note: no GPU was found, training runs on the CPU"


def check_shared_memory(patient: Patient) -> Iterator[str]:
    """Room for the batches that loader processes hold ready."""
    config = patient.config
    workers = config.data.num_workers
    workers = datasets.auto_num_workers(1) if workers == "auto" else workers
    if not workers or not SHARED_MEMORY.is_dir():
        yield "not needed: no loader processes" if not workers else f"no {SHARED_MEMORY} here"
        return
    # Each process prepares two batches and works at a third; training and evaluation.
    batch = config.data.batch_size
    pictures = 3 * workers * (batch + (config.data.eval_batch_size or math.ceil(1.5 * batch)))
    need = pictures * 3 * config.model.input_size**2 * 4
    free = shutil.disk_usage(SHARED_MEMORY).free
    yield f"{free / GIB:.2f} GiB free, up to {need / GIB:.2f} GiB used by {workers} processes"
    if free < need:
        raise UserError(
            f"shared memory: {free / GIB:.2f} GiB free in {SHARED_MEMORY}, {need / GIB:.2f} "
            "needed: lower --num-workers or --batch-size, or give a container --shm-size=8g"
        )


def check_folder(patient: Patient) -> Iterator[str]:
    """The output directory: writable, and not another run's."""
    resume = patient.config.run.resume
    if checkpoint.holds_run(patient.folder) and not resume:
        raise UserError(
            f"{patient.folder} already holds a run: add --resume auto, or another --output-dir"
        )
    with _for_a_while(patient.folder):
        yield f"{patient.folder} can be written"


@contextlib.contextmanager
def _for_a_while(folder: Path) -> Iterator[None]:
    """``folder`` exists inside; what was made for it, and is empty, goes again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_writable(folder)
    try:
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def check_data(patient: Patient) -> Iterator[str]:
    """Both parts are found, and pictures from all over them can be read."""
    utils.import_plugins(patient.config.run.plugin)
    bad, seconds = [], []
    for name in ("train", "val"):
        part = datasets.build_dataset(
            name == "train", patient.config.data, None, seed=patient.config.run.seed
        )
        yield f"{name}: {len(part)} pictures, {len(part.classes)} classes"
        count = min(LOOKED_AT, len(part))
        for index in np.linspace(0, len(part) - 1, count).round().astype(int).tolist():
            began = time.monotonic()
            try:
                datasets.decode(part.source.read(index)[0])
            except (datasets.BadPictureError, OSError) as error:
                bad.append(f"{part.sample_id(index)}: {error}")
            seconds.append(time.monotonic() - began)
    yield f"{len(seconds)} pictures read, {1000 * np.mean(seconds):.1f} ms each"
    if bad and patient.config.data.on_bad_image == "error":
        raise UserError(
            f"{len(bad)} of {len(seconds)} pictures can't be read, {bad[0]}: mend or remove them, "
            "or add --on-bad-image skip; python -m tools.data explore finds all"
        )
    if bad:
        yield f"note: {len(bad)} of them can't be read and will be skipped"


def check_model(patient: Patient) -> Iterator[str]:
    """Model, criterion, optimiser and loaders can be built."""
    trial = Trial(patient.config, patient.processes, patient.device)
    patient.trial = trial
    summary = trial.parts.summary
    yield (
        f"{patient.config.model.model}: {summary.parameters / 1e6:.2f} M parameters, "
        f"{summary.macs / 1e9:.2f} GMACs; {trial.data.steps} steps an epoch"
    )


def check_training(patient: Patient) -> Iterator[str]:
    """A few updates of the real training."""
    trial = patient.needs_trial()
    reports: list[engine.StepReport] = []
    moments: list[float] = []

    def note(report: engine.StepReport) -> None:
        reports.append(report)
        moments.append(time.monotonic())

    try:
        trial.train(min(1 + TIMED, trial.data.updates_per_epoch(patient.config)), report=note)
    except engine.NonFinite:
        raise UserError("the loss is not finite: python -m tools.overfit says more") from None
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"out of memory with --batch-size {patient.config.data.batch_size}: lower it and raise "
            "--accum-steps, or add --grad-checkpointing"
        ) from None
    laps = np.diff(moments)
    patient.seconds_per_update = float(np.median(laps)) if len(laps) else 0.0
    yield f"{len(reports)} updates, loss {reports[0].loss:.3f} to {reports[-1].loss:.3f}"
    if len(laps):
        yield f"{patient.seconds_per_update:.3g} s an update, after the first"


def check_evaluation(patient: Patient) -> Iterator[str]:
    """Two batches of the validation part, judged as in training."""
    trial = patient.needs_trial()
    loader, count = trial.data.val_loader, min(2, len(trial.data.val_loader))
    began = time.monotonic()
    result = engine.evaluate(
        trial.state.model,
        itertools.islice(iter(loader), count),
        trial.options,
        num_classes=len(trial.data.class_names),
        batch_size=loader.batch_size,
    )
    seconds = time.monotonic() - began
    patient.evaluation_seconds = seconds / count * len(loader)
    yield f"{result.count} pictures, loss {result.loss:.3f}, top-1 {result.acc1:.1f} %"
    monitor = patient.config.save.best_metric
    if monitor.endswith("acc5") and result.acc5 is None:
        raise UserError(f"--best-metric: {monitor} needs at least 5 classes")


def check_checkpoint(patient: Patient) -> Iterator[str]:
    """A checkpoint is written, read, put back and compared."""
    state = patient.needs_trial().state
    with (
        _for_a_while(patient.folder),
        tempfile.TemporaryDirectory(prefix=".doctor-", dir=patient.folder) as temporary,
    ):
        path = Path(temporary) / "checkpoint.pth"
        try:
            checkpoint.save(path, state.state_dict())
        except OSError as error:
            raise UserError(f"a checkpoint can't be written: {error.strerror}") from None
        content = checkpoint.load_file(path)
        size = path.stat().st_size
    state.load_state_dict(content)
    saved = content["model"]
    if any(not torch.equal(v.cpu(), saved[k]) for k, v in state.model.state_dict().items()):
        raise UserError("a checkpoint was read back otherwise than written: is the disk sound?")
    average = sum(v.numel() * v.element_size() for v in saved.values())
    patient.checkpoint_bytes = size + (average if patient.config.ema.model_ema else 0)
    yield f"written and read back, {patient.checkpoint_bytes / 2**20:.1f} MiB each"


def check_disk(patient: Patient) -> Iterator[str]:
    """Room for the checkpoints that lie in the folder at the same time."""
    if not patient.checkpoint_bytes:
        raise Skip("a checkpoint's size")
    there = next(p for p in (patient.folder, *patient.folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(there).free
    # The newest, the best, and the one that is being written.
    need = (patient.config.save.keep + 2) * patient.checkpoint_bytes
    yield f"{free / GIB:.1f} GiB free, {need / GIB:.2f} GiB for checkpoints"
    if free < need:
        raise UserError(
            f"disk: {free / GIB:.2f} GiB free at {there}, {need / GIB:.2f} needed for checkpoints: "
            "free space, lower --keep, or choose another --output-dir"
        )


def check_memory(patient: Patient) -> Iterator[str]:
    """The peak so far, on the device and on the host."""
    patient.needs_trial()
    if patient.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(patient.device) / GIB
        there = torch.cuda.get_device_properties(patient.device).total_memory / GIB
        yield f"device: peak {peak:.1f} of {there:.1f} GiB"
        if peak > 0.95 * there:
            raise UserError(
                f"device memory: {peak:.1f} of {there:.1f} GiB: lower --batch-size, "
                "or add --grad-checkpointing"
            )
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    yield f"host: peak {host:.1f} GiB in this process"


def check_time(patient: Patient) -> Iterator[str]:
    """An estimate of the whole run on this device alone."""
    if not patient.seconds_per_update:
        raise Skip("a timed training step")
    config, trial = patient.config, patient.needs_trial()
    epochs = config.run.epochs + config.schedule.cooldown_epochs
    training = patient.seconds_per_update * trial.data.updates_per_epoch(config)
    # The moving average is evaluated too.
    judging = patient.evaluation_seconds * (2 if config.ema.model_ema else 1)
    yield (
        f"about {duration(training + judging)} an epoch, {duration(epochs * (training + judging))} "
        f"for {epochs}, in one process"
    )


CHECKS: dict[str, Check] = {
    "environment": check_environment,
    "shared memory": check_shared_memory,
    "output directory": check_folder,
    "data": check_data,
    "model": check_model,
    "training": check_training,
    "evaluation": check_evaluation,
    "checkpoint": check_checkpoint,
    "disk": check_disk,
    "memory": check_memory,
    "time": check_time,
}


def examine(patient: Patient) -> dict[str, str]:
    """Make all checks; returns what is to be mended, by check."""
    problems: dict[str, str] = {}
    for name, check in CHECKS.items():
        verdict, lines = "ok", []
        try:
            for line in check(patient):
                lines.append(line)
        except Skip as needed:
            verdict = "skipped"
            lines.append(f"needs {needed}")
        except UserError as error:
            verdict, problems[name] = "to fix", str(error)
        except Exception as error:  # whatever a model, a plugin or a driver raises is a finding
            verdict, problems[name] = "to fix", f"{type(error).__name__}: {error}"
        print(f"{name:<17} {verdict:<8} {lines[0] if lines else problems[name]}")
        for line in lines[1:]:
            print(f"{'':<26} {line}")
    return problems


def _carry_out(arguments: argparse.Namespace) -> int:
    config: Config = arguments.config
    # Each update is timed; the other options stay those of the run.
    config = config.replace("doctor", log_interval=1)
    with single_process(config) as (processes, device):
        problems = examine(Patient(config, processes, device, output_folder(config)))
    if not problems:
        print("ready")
        return 0
    print(f"{len(problems)} to fix:")
    for name, problem in problems.items():
        print(f"  {name}: {problem}")
    return UserError.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 if all is ready, else 2."""
    return command.run(_carry_out, command.run_parser("doctor", __doc__), argv)


if __name__ == "__main__":
    sys.exit(main())
