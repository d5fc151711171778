"""A dry run: would this training work here?

    python -m tools.doctor --config configs/quickstart.yaml

Takes the options of main.py and checks the machine, shared memory, the output directory, the data,
a few training steps, an evaluation, a save and a load, memory, disk space and time. A check that
fails doesn't keep the others from running. Ends with "ready" (exit code 0) or the list of what is
to fix (exit code 2). Nothing is left behind.
"""

import argparse
import contextlib
import dataclasses
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

import engine
from architectures.sizes import size_text
from augmentation.protocol import RGB, Form
from checkpointing.files import load_checkpoint, save_checkpoint
from config import Config
from distributed.processes import Processes
from errors import UserError
from loggers import duration
from outputs.console import each_message_once, say
from pipeline import jpeg
from pipeline.bands import decode_bands
from pipeline.dataset import build_parts, findings
from pipeline.decoding import BadImageError, decode
from pipeline.loader import TooFewImagesError
from pipeline.workers import free_shared_memory, shared_memory_needed
from samplers import SampleKey
from tools.common import command
from tools.common.stage import Trial, single_process
from tools.common.timing import (
    Training,
    affordable,
    images_per_update,
    time_evaluation,
    time_training,
)
from training.batch_size import out_of_memory_advice, probe, train_with_largest_batch
from training.build import total_epochs
from training.data import loader_settings, worker_batch_bytes
from training.intervals import validations
from training.outlook import few_images, large_images, lost_levels
from training.plugins import import_plugins
from training.resume import make_writable, output_folder, refuse_other_run
from training.run import assemble
from training.saving import versions
from training.trainer import DATA_WAIT
from utils import cores

SAMPLED = 32  # images of each part that are read, evenly spread
MANY = 10_000  # images from which on it is said how fast they are found
MOST_DECODING = 3.0  # seconds of a core
LONG = 600  # seconds of a run from which on it is said what makes it shorter
GIB = 2**30


class SkippedCheck(Exception):
    """A check that can't be made; the message says what it needs."""


@dataclasses.dataclass
class PlannedRun:
    """The run, and what the checks before have found out about it."""

    config: Config
    processes: Processes
    device: torch.device
    folder: Path
    """Where the run is to be written."""
    trial: Trial | None = None
    """The run's parts, once they are built."""
    checkpoint_bytes: int = 0
    tried: Trial | None = None
    """The same, with batches that don't take long here."""
    training: Training | None = None
    evaluation_seconds: float = 0.0
    """Of the whole validation part."""
    seconds: float = 0.0
    """Of the whole run."""

    def built_trial(self) -> Trial:
        """The run's parts. Raises SkippedCheck where they could not be built."""
        if self.trial is None:
            raise SkippedCheck("data and model")
        return self.trial


# Each check yields lines to show, raises UserError for what is to fix.
Check = Callable[[PlannedRun], Iterator[str]]


def check_environment(run: PlannedRun) -> Iterator[str]:
    """Versions, machine and device."""
    found = versions() | {"python": platform.python_version()}
    yield ", ".join(f"{name} {version}" for name, version in found.items())
    yield f"{platform.platform()}, {cores()} cores, device {run.device}"
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        yield f"cuda:{number} {gpu.name}, {gpu.total_memory / GIB:.0f} GiB"
    if run.config.run.device == "auto" and run.device.type == "cpu":
        yield "note: no GPU was found, training runs on the CPU"
    if not jpeg.is_fast():
        yield f"note: JPEG files are decoded by Pillow ({jpeg.HINT})"


def check_shared_memory(run: PlannedRun) -> Iterator[str]:
    """The batches that workers hold ready fit, as the run itself computes it."""
    config = run.config
    try:
        workers = loader_settings(config, run.processes, 1, drop_last=False).num_workers
    except UserError:
        # The checks that follow need no worker.
        run.config = config.replace("doctor", num_workers=0)
        raise
    free = free_shared_memory()
    if not workers or free is None:
        yield "not needed: no workers" if not workers else "no /dev/shm here"
        return
    need = shared_memory_needed(worker_batch_bytes(config), workers)
    yield f"{free / GIB:.2f} GiB free, up to {need / GIB:.2f} GiB used by {workers} workers"


def check_folder(run: PlannedRun) -> Iterator[str]:
    """The output directory: writable, and not another run's."""
    refuse_other_run(run.config, run.folder)
    with _temporarily(run.folder):
        yield f"{run.folder} can be written"


@contextlib.contextmanager
def _temporarily(folder: Path) -> Iterator[None]:
    """``folder`` exists inside; what was made for it, and is empty, is removed again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_writable(folder)
    try:
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def check_data(run: PlannedRun) -> Iterator[str]:
    """Both parts are found, and images from all over them can be read."""
    import_plugins(run.config.run.plugin)
    bad, seconds = [], []
    began = time.monotonic()
    parts = build_parts(run.config.data, seed=run.config.run.seed)
    form = Form(run.config.model.in_chans, run.config.data.bit_depth)
    listed, images = time.monotonic() - began, sum(map(len, parts))
    for name, part in zip(("train", "val"), parts, strict=True):
        yield f"{name}: {len(part)} images, {len(part.classes)} classes"
        count = min(SAMPLED, len(part))
        for index in np.linspace(0, len(part) - 1, count).round().astype(int).tolist():
            began = time.monotonic()
            try:
                image = part.source.read(index)[0]
                decode(image) if form == RGB else decode_bands(image, form)
            except (BadImageError, OSError) as error:
                bad.append(f"{part.sample_id(index)}: {error}")
            seconds.append(time.monotonic() - began)
    if images >= MANY:
        rate = images / listed
        yield f"found in {listed:.2g} s, {rate:,.0f} images/s; once on each machine"
    yield f"{len(seconds)} images read, {1000 * np.mean(seconds):.1f} ms each"
    yield from (f"warning: {text}" for text in findings(*parts))
    if advice := lost_levels(run.config, parts[0]):
        yield f"warning: {advice}"
    if bad and run.config.data.on_bad_image == "error":
        raise UserError(
            f"{len(bad)} of {len(seconds)} images can't be read, {bad[0]}: repair or remove them, "
            "or add --on-bad-image skip; python -m tools.data explore finds all"
        )
    if bad:
        yield f"note: {len(bad)} of them can't be read and will be skipped"


def check_model(run: PlannedRun) -> Iterator[str]:
    """Model, criterion, optimiser and loaders can be built."""
    trial = Trial(run.config, run.processes, run.device)
    run.trial = trial
    summary = trial.parts.summary
    yield (
        f"{run.config.model.model}: {summary.parameters / 1e6:.2f} M parameters, "
        f"{summary.macs / 1e9:.2f} GMACs; {trial.data.steps} steps per epoch"
    )


def check_decoding(run: PlannedRun) -> Iterator[str]:
    """What a worker does for an image, on one core, and what would spare it."""
    data = run.built_trial().data
    if data.train_loader.cached:
        yield "not needed: images are kept decoded"
        return
    began, done = time.process_time(), 0
    for index in np.linspace(0, len(data.train) - 1, min(SAMPLED, len(data.train))).astype(int):
        done += data.train[SampleKey(int(index), 0, int(index))].image is not None
        if time.process_time() - began > MOST_DECODING:
            break
    if not done:
        raise SkippedCheck("images that can be read")
    each = (time.process_time() - began) / done
    yield f"{1000 * each:.2g} ms for each training image, {1 / each:,.0f} images/s per core"
    if advice := large_images(run.config, data, each):
        yield f"note: {advice}"


def check_training(run: PlannedRun) -> Iterator[str]:
    """A few updates of the real training."""
    trial, config = run.built_trial(), run.config
    if config.model.unfreeze_at:
        # Later epochs train more: the slowest counts, in time and memory.
        trial.parts.freezer.apply(total_epochs(config) - 1)
    try:
        with out_of_memory_advice(config, run.device):
            run.tried = affordable(trial)
            done = run.training = time_training(trial, run.tried)
    except engine.NonFinite:
        raise UserError("the loss is not finite: python -m tools.overfit says more") from None
    first, last = done.reports[0], done.reports[-1]
    yield f"{len(done.reports)} updates, loss {first.loss:.3f} to {last.loss:.3f}"
    batch, tried = images_per_update(trial), images_per_update(run.tried)
    scaled = f": scaled from {tried} images, not {batch}, at a time" if tried < batch else ""
    yield f"{done.seconds:.3g} s per update, after the first{scaled}"


def check_evaluation(run: PlannedRun) -> Iterator[str]:
    """Some batches of the validation part, evaluated as in training."""
    result, run.evaluation_seconds = time_evaluation(run.tried or run.built_trial())
    if not result.count:
        raise UserError("no validation image could be read: python -m tools.data explore finds why")
    scores = result.scores()
    name, key = ("mAP", "map") if "map" in scores else ("top-1", "acc1")
    yield f"{result.count} images, loss {result.loss:.3f}, {name} {scores[key]:.1f} %"


def check_checkpoint(run: PlannedRun) -> Iterator[str]:
    """A checkpoint is written, read, put back and compared."""
    state = run.built_trial().state
    with (
        _temporarily(run.folder),
        tempfile.TemporaryDirectory(prefix=".doctor-", dir=run.folder) as temporary,
    ):
        path = Path(temporary) / "checkpoint.pth"
        try:
            save_checkpoint(path, state.state_dict())
        except OSError as error:
            raise UserError(f"a checkpoint can't be written: {error.strerror}") from None
        content = load_checkpoint(path)
        size = path.stat().st_size
    state.load_state_dict(content)
    saved = content["model"]
    if any(not torch.equal(v.cpu(), saved[k]) for k, v in state.model.state_dict().items()):
        raise UserError("a checkpoint was read back otherwise than written: is the disk damaged?")
    average = sum(v.numel() * v.element_size() for v in saved.values())
    run.checkpoint_bytes = size + (average if run.config.ema.model_ema else 0)
    yield f"written and read back, {run.checkpoint_bytes / 2**20:.1f} MiB each"


def check_disk(run: PlannedRun) -> Iterator[str]:
    """Free space for the checkpoints that lie in the folder at the same time."""
    if not run.checkpoint_bytes:
        raise SkippedCheck("a checkpoint's size")
    there = next(p for p in (run.folder, *run.folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(there).free
    # The newest, the best, and the one that is being written.
    need = (run.config.save.keep + 2) * run.checkpoint_bytes
    yield f"{free / GIB:.1f} GiB free, {need / GIB:.2f} GiB for checkpoints"
    if free < need:
        raise UserError(
            f"disk: {free / GIB:.2f} GiB free at {there}, {need / GIB:.2f} needed for checkpoints: "
            "free space, lower --keep, or choose another --output-dir"
        )


def check_memory(run: PlannedRun) -> Iterator[str]:
    """The peak so far, on the device and on the host."""
    run.built_trial()
    if run.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(run.device) / GIB
        there = torch.cuda.get_device_properties(run.device).total_memory / GIB
        yield f"device: peak {peak:.1f} of {there:.1f} GiB"
        if peak > 0.95 * there:
            raise UserError(
                f"device memory: {peak:.1f} of {there:.1f} GiB: lower --batch-size, "
                "or add --grad-checkpointing"
            )
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    tried, batch = run.tried or run.trial, run.trial.settings.batch_size
    few = f" with {tried.settings.batch_size} images, not {batch}, at a time"
    yield (
        f"host: peak {host:.1f} GiB in this process"
        + (few if tried.settings.batch_size < batch else "")
    )


def check_time(run: PlannedRun) -> Iterator[str]:
    """An estimate of the whole run on this device alone, and what makes it shorter."""
    if run.training is None:
        raise SkippedCheck("a timed training step")
    if not run.evaluation_seconds:
        raise SkippedCheck("a timed evaluation")
    config, trial = run.config, run.built_trial()
    training = run.training.seconds * trial.data.updates_per_epoch(config)
    # The moving average is evaluated too.
    evaluation = run.evaluation_seconds * (2 if config.ema.model_ema else 1)
    times = validations(config, 0, total_epochs(config))
    run.seconds = total_epochs(config) * training + times * evaluation
    yield (
        f"about {duration(run.seconds)} for {total_epochs(config)} epochs in one process; an "
        f"epoch: training {duration(training)}, evaluation {duration(evaluation)}"
    )
    if config.model.unfreeze_at:
        yield "as if all that --unfreeze-at frees were trained from the start"
    if run.seconds > LONG:
        ways = _ways_to_shorten(run, times * evaluation / run.seconds)
        yield f"shorter by: {'; '.join(ways)}"
    advice = few_images(config, trial.data.train, trial.state.model, run.folder)
    if advice:
        yield f"warning: {advice}"


def _ways_to_shorten(run: PlannedRun, evaluation: float) -> Iterator[str]:
    """What to change, the easiest first; ``evaluation`` is its share of the time."""
    config, device = run.config, run.device.type
    if device == "cpu":
        yield "a GPU"
    elif torch.cuda.device_count() > 1 and device == "cuda":
        yield f"torchrun --nproc-per-node {torch.cuda.device_count()} main.py …"
    if run.training.data_wait > DATA_WAIT:
        yield from run.built_trial().data.ways_to_feed_faster(config)
    elif device == "cuda" and not config.model.compile:
        yield "--compile"
    if config.ema.model_ema and evaluation > 0.2:
        yield "--no-model-ema (the average is evaluated too)"
    if evaluation > 0.2 and config.run.epochs > 1:
        yield f"a larger --val-interval than {config.run.val_interval}"
    yield f"fewer --epochs than {config.run.epochs}"
    yield f"a smaller --model, or --input-size than {size_text(config.model.size)}"


CHECKS: dict[str, Check] = {
    "environment": check_environment,
    "shared memory": check_shared_memory,
    "output directory": check_folder,
    "data": check_data,
    "model": check_model,
    "decoding": check_decoding,
    "training": check_training,
    "evaluation": check_evaluation,
    "checkpoint": check_checkpoint,
    "disk": check_disk,
    "memory": check_memory,
    "time": check_time,
}


def examine(run: PlannedRun) -> dict[str, str]:
    """Make all checks; returns what is to fix, by check."""
    problems: dict[str, str] = {}
    for name, check in CHECKS.items():
        verdict, lines = "ok", []
        try:
            for line in check(run):
                lines.append(line)
        except SkippedCheck as needed:
            verdict = "skipped"
            lines.append(f"needs {needed}")
        except UserError as error:
            verdict, problems[name] = "to fix", str(error)
        except Exception as error:  # whatever a model, a plug-in or a driver raises is to fix
            verdict, problems[name] = "to fix", f"{type(error).__name__}: {error}"
        say(f"{name:<17} {verdict:<8} {lines[0] if lines else problems[name]}")
        for line in lines[1:]:
            say(f"{'':<26} {line}")
    return problems


def _carry_out(arguments: argparse.Namespace) -> int:
    config: Config = arguments.config
    # Each update is timed; the other options stay those of the run.
    config = config.replace("doctor", log_interval=1)
    with single_process(config, finds_batch=True) as (config, processes, device):
        if config.data.batch_size != "auto":
            return _examine(config, processes, device)

        def attempt(chosen: Config) -> int:
            try:
                probe(assemble(chosen, processes, device))
            except TooFewImagesError:
                raise
            except UserError:
                pass  # its check will tell
            return _examine(chosen, processes, device)

        folder = output_folder(config)
        return train_with_largest_batch(config, folder, processes, device, attempt)


def _examine(config: Config, processes: Processes, device: torch.device) -> int:
    """Check, print what was found; returns the exit code."""
    run = PlannedRun(config, processes, device, output_folder(config))
    with each_message_once():
        problems = examine(run)
    if not problems:
        print(f"ready: about {duration(run.seconds)}")
        return 0
    print(f"{len(problems)} to fix:")
    for name, problem in problems.items():
        say(f"  {name}: {problem}")
    return UserError.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 if all is ready, else 2."""
    return command.run(_carry_out, command.run_parser("doctor", __doc__), argv)


if __name__ == "__main__":
    sys.exit(main())
