"""The epochs of a run: train, evaluate, log, save, stop, and what to do when it goes wrong."""

import copy
import itertools
import json
import logging
import platform
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

import checkpoint
import datasets
import engine
import models
import optim
import parallel
import utils
from augment import Preprocessing, build_mixer
from build import Data, effective_batch, step_options
from config import Config, unused
from errors import DataError, DivergedError, OptionError
from loggers import (
    CURVES_FILE,
    LOG_FILE,
    PER_CLASS_FILE,
    PER_CLASS_LIMIT,
    RunLogger,
    Stopwatch,
    write_per_class,
)
from state import TrainState, is_better

log = logging.getLogger(__name__)

BAD_IMAGES_FILE = "bad_images.txt"
MAX_ROLLBACKS = 5
DATA_WAIT = 0.1  # share of the time that pictures may be waited for without a word


class Trainer:
    """Runs the epochs and writes what comes of them."""

    def __init__(
        self,
        config: Config,
        processes: utils.Processes,
        folder: Path,
        data: Data,
        preprocessing: Preprocessing,
        criterion: nn.Module,
        state: TrainState,
        freezer: optim.Freezer,
        device: torch.device,
        summary: models.ModelSummary,
        bad_images: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.processes = processes
        self.folder = folder
        self.data = data
        self.preprocessing = preprocessing
        self.criterion = criterion
        self.state = state
        self.freezer = freezer
        self.mixer = build_mixer(config.augment, len(data.class_names))
        self.summary = summary
        self.options = step_options(config, processes, device, data, state.model, macs=summary.macs)
        self.told_to_feed_faster = False
        self.total_epochs = config.run.epochs + config.schedule.cooldown_epochs
        self.bad_images: dict[str, None] = {}  # of this process, an ordered set
        self.listed_bad: dict[str, None] = dict.fromkeys(bad_images)  # of all, earlier sessions too
        self.writer: checkpoint.BackgroundWriter | parallel.ShardedWriter
        if config.dist.fsdp:
            self.writer = parallel.ShardedWriter(
                folder, save_rest=checkpoint.save, finished=self._keep_newest
            )
        else:
            self.writer = checkpoint.BackgroundWriter(folder, keep=config.save.keep)
        self.saved_at = time.monotonic()
        self.logger = self._open_logger()

    def _open_logger(self) -> RunLogger:
        progress = self.state.progress
        return RunLogger(
            self.folder if self.processes.is_main else None,
            tensorboard=self.config.log.tensorboard,
            print_epoch=self.config.log.print_epoch,
            epoch=progress.epoch,
            update=progress.update,
        )

    def introduce(self) -> None:
        """Say what is about to be trained on what, and how."""
        config, data, model, summary = self.config, self.data, self.state.model, self.summary
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        log.info(
            "model    %s: %.2f M parameters (%.2f M trainable), %.2f GMACs at %d×%d",
            config.model.model, summary.parameters / 1e6, trainable / 1e6,
            summary.macs / 1e9, config.model.input_size, config.model.input_size,
        )  # fmt: skip
        log.info(
            "data     %s: %d training and %d validation pictures, %d classes",
            config.data.data_set, len(data.train), len(data.val), len(data.class_names),
        )  # fmt: skip
        _, lines = datasets.summarise_classes(data.train)
        for line in lines:
            warning = line.removeprefix("warning: ")
            log.log(logging.INFO if warning == line else logging.WARNING, "         %s", warning)
        log.info("input    %s", data.describe(self.options.device))
        batch = effective_batch(config, self.processes)
        rate = self.state.schedule.lr
        rule = "as given" if config.optim.unscale_lr else f"{config.optim.lr:g} × {batch} / 512"
        log.info(
            "batch    %d = %d × %d process(es) × %d accumulated; learning rate %.3g (%s)",
            batch, config.data.batch_size, self.processes.world_size, config.optim.accum_steps,
            rate, rule,
        )  # fmt: skip
        amp = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[self.options.amp]
        log.info(
            "run      %d epochs of %d steps on %s in %s, into %s",
            self.total_epochs, data.steps, self.options.device, amp, self.folder,
        )  # fmt: skip
        for line in unused(config):
            log.warning("%s", line)
        if config.log.tb_graph:
            side = config.model.input_size
            self.logger.graph(model, torch.zeros(1, 3, side, side, device=self.options.device))

    # --- the loop ---------------------------------------------------------------------------------

    def fit(self, stop: utils.StopRequest) -> int:
        """Train to the last epoch, an early stop or a signal; returns the exit code."""
        progress = self.state.progress
        if self.config.optim.on_nonfinite == "rollback" and not checkpoint.in_folder(self.folder):
            self._save({})
        while progress.epoch < self.total_epochs:
            watch = Stopwatch()
            if self.freezer.apply(progress.epoch) and self.processes.distributed:
                self.state.rewrap()
            rollbacks = progress.rollbacks
            if not self._train_epoch(stop):
                return self._interrupted(stop)
            progress = self.state.progress
            if progress.rollbacks > rollbacks:
                continue
            self._finish_epoch(watch)
            if self._out_of_patience():
                log.info(
                    "early stop: no better %s for %d epochs",
                    self.config.save.best_metric, self.config.save.early_stop,
                )  # fmt: skip
                self._save_here()
                break
            if stop.agreed() and progress.epoch < self.total_epochs:
                return self._interrupted(stop)
            if self.config.run.stop_at_epoch and progress.epoch >= self.config.run.stop_at_epoch:
                break
        return self._conclude()

    def _train_epoch(self, stop: utils.StopRequest) -> bool:
        """Train to the end of the epoch under way; False if asked to stop before."""
        progress = self.state.progress
        batches = self.data.batches(progress.epoch, progress.samples)
        steps = progress.step + len(batches)
        self.logger.start_epoch(progress.epoch, self.total_epochs, steps, progress.step)
        try:
            return engine.train_one_epoch(
                self.state,
                self.criterion,
                self._watched(batches),
                self.options,
                steps=steps,
                mixer=self.mixer,
                report=self._report,
                wish=lambda: self._wish(stop),
                save=lambda: self._save({}),
                skipped=self._note_skipped,
            )
        except engine.NonFinite as failure:
            self.logger.end_bar()
            self._diverged(failure)
            return True
        except DataError:
            if stop.signal is None:
                raise
            # The signal went to the loader processes too.
            return False

    def _report(self, report: engine.StepReport) -> None:
        """Log a step; say once what to change where pictures keep the device waiting."""
        self.logger.step(report)
        slow = report.data_wait > DATA_WAIT and not report.warm_up
        if slow and not self.told_to_feed_faster:
            self.told_to_feed_faster = True
            log.warning(
                "%.0f %% of the time goes into waiting for pictures: %s",
                100 * report.data_wait, "; ".join(self.data.ways_to_feed_faster(self.config)),
            )  # fmt: skip

    def _watched(self, batches: Any) -> Any:
        """Pass batches through; note bad pictures, move the bar, draw the first grid."""
        for number, batch in enumerate(batches):
            self._note_bad(batch.bad)
            self.logger.advance(self.state.progress.step)
            if number == 0 and self.state.progress.update == 0:
                self._show(batch)
            yield batch

    def _show(self, batch: datasets.Batch) -> None:
        """The pictures of ``batch`` as the model sees them, in TensorBoard."""
        images = self.options.inputs(batch)
        if self.mixer is not None:
            images, _ = self.mixer(images.clone(), self.options.place(batch.targets), 0)
        self.logger.pictures(images, self.preprocessing.mean, self.preprocessing.std)

    def _note_bad(self, lines: list[str]) -> None:
        for line in lines:
            if line not in self.bad_images:
                self.bad_images[line] = None
                log.warning("picture skipped: %s", line)

    def _gather_bad(self) -> None:
        """Bring together what all processes could not read, and list it in the folder."""
        before = len(self.listed_bad)
        for lines in utils.gather(list(self.bad_images)):
            self.listed_bad |= dict.fromkeys(lines)
        if self.processes.is_main and len(self.listed_bad) > before:
            text = "".join(f"{line}\n" for line in self.listed_bad)
            self._try_to_write(
                BAD_IMAGES_FILE, lambda path: path.write_text(text, encoding="utf-8")
            )

    def _try_to_write(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file that training can do without."""
        try:
            write(self.folder / name)
        except OSError as error:
            log.warning("%s can't be written to %s: %s", name, self.folder, error.strerror or error)

    def _finish_epoch(self, watch: Callable[[], float]) -> None:
        """Evaluate, log and save after an epoch."""
        state, config, progress = self.state, self.config, self.state.progress
        if config.log.tb_histograms:
            self.logger.histograms(state.model, progress.update)
        record: dict[str, Any] = {
            "epoch": progress.epoch,
            "train_lr": state.schedule.last,
            "train_loss": progress.loss_sum / max(progress.loss_count, 1),
        }
        # Each process has gathered batch statistics of its own; those that are saved are judged.
        utils.broadcast_buffers(state.model)
        result = self._evaluate(state.model, "evaluate")
        record |= {"test_loss": result.loss, "test_acc1": result.acc1}
        if result.acc5 is not None:
            record["test_acc5"] = result.acc5
        if state.ema:
            utils.broadcast_buffers(state.ema.module)
            average = self._evaluate(state.ema.module, "evaluate EMA")
            record |= {"ema_loss": average.loss, "ema_acc1": average.acc1}
            if average.acc5 is not None:
                record["ema_acc5"] = average.acc5
        monitor = config.save.best_metric
        if monitor not in record:
            raise OptionError(
                "best_metric", f"{monitor} needs at least 5 classes: use {monitor[:-1]}1"
            )
        lower = monitor.endswith("loss")
        best = is_better(record[monitor], progress.best, lower=lower)
        delta = config.save.early_stop_delta
        if is_better(record[monitor], progress.reference, lower=lower, delta=delta):
            progress.reference, progress.improved_epoch = record[monitor], progress.epoch
        if best:
            progress.best, progress.best_epoch = record[monitor], progress.epoch
            if len(self.data.class_names) <= PER_CLASS_LIMIT and self.processes.is_main:
                shown = average if monitor.startswith("ema_") else result
                self._try_to_write(
                    PER_CLASS_FILE,
                    lambda path: write_per_class(path, self.data.class_names, shown),
                )
        state.schedule.end_epoch(record[monitor])
        self._gather_bad()
        record |= {
            "n_parameters": self.summary.parameters,
            "update": progress.update,
            "skipped_updates": progress.skipped,
            "bad_images": len(self.listed_bad),
            "epoch_seconds": watch(),
        }
        progress.end_epoch()
        self.logger.epoch(record, epochs=self.total_epochs, best=best)
        last = progress.epoch in (self.total_epochs, config.run.stop_at_epoch)
        if best or last or progress.epoch % config.save.save_every == 0:
            self._save(record, best=best)

    def _evaluate(self, model: nn.Module, name: str) -> engine.Evaluation:
        loader = self.data.val_loader
        self.logger.start_evaluation(len(loader), name)
        batches = (self._passed_on(batch) for batch in loader)
        if next(model.parameters()).device != self.options.device:
            # A moving average that lives in host memory.
            model = copy.deepcopy(model).to(self.options.device)
        result = engine.evaluate(
            model,
            batches,
            self.options,
            num_classes=len(self.data.class_names),
            batch_size=loader.batch_size,
            shared=self.config.dist.dist_eval,
            progress=self.logger.advance,
        )
        self.logger.end_bar()
        if result.count == 0:
            raise DataError("no validation picture could be read")
        return result

    def _passed_on(self, batch: datasets.Batch) -> datasets.Batch:
        self._note_bad(batch.bad)
        return batch

    def _out_of_patience(self) -> bool:
        patience, progress = self.config.save.early_stop, self.state.progress
        return patience > 0 and progress.epoch - 1 - progress.improved_epoch >= patience

    # --- saving -----------------------------------------------------------------------------------

    def _save(self, metrics: dict[str, Any], *, best: bool = False) -> None:
        """Hand a checkpoint to the writer."""
        self.saved_at = time.monotonic()
        if self.config.dist.fsdp:
            self._save_sharded(metrics, best)
        elif self.processes.is_main:
            self.writer.submit(self._content(metrics), best=best)

    def _save_sharded(self, metrics: dict[str, Any], best: bool) -> None:
        # Statistics of batch norms are those of the main process, for it writes what isn't sharded.
        utils.broadcast_buffers(self.state.model)
        content, progress = self._content(metrics), self.state.progress
        self.writer.submit(
            f"{checkpoint.name_of(progress.epoch, progress.samples)}.shards", content
        )
        if best:
            # One file for whoever uses the model.
            weights = {k: parallel.whole_on_main(content[k]) for k in ("model", "model_ema")}
            if self.processes.is_main:
                checkpoint.write_best(self.folder, checkpoint.without_optimizer(content) | weights)

    def _keep_newest(self, written: Path) -> None:
        checkpoint.keep_newest(self.folder, self.config.save.keep, written)

    def _content(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds; see checkpoint.py."""
        return self.state.state_dict() | {
            "rng": utils.rng_state(),
            "config": self.config.recipe(),
            "class_names": self.data.class_names,
            "preprocessing": self.preprocessing.to_dict(),
            "metrics": metrics,
            "bad_images": list(self.listed_bad),
            "versions": versions(),
        }

    def _wish(self, stop: utils.StopRequest) -> engine.Wish:
        """What all processes do after this update: stop, save or go on."""
        if stop.agreed():
            return engine.Wish.STOP
        options = self.config.save
        due = (
            options.save_every_steps and self.state.progress.update % options.save_every_steps == 0
        )
        if options.save_every_minutes:
            minutes = (time.monotonic() - self.saved_at) / 60
            due = utils.any_process(minutes >= options.save_every_minutes) or due
        return engine.Wish.SAVE if due else engine.Wish.GO

    def _save_here(self) -> None:
        """Save where training stands, unless that is on disk already."""
        progress = self.state.progress
        self.writer.wait()
        here = checkpoint.name_of(progress.epoch, progress.samples)
        if self.writer.saved is None or self.writer.saved.stem != here:
            self._save({})
            self.writer.wait()

    def _interrupted(self, stop: utils.StopRequest) -> int:
        """Save where training stands, say how to go on."""
        self.logger.end_bar()
        self._save_here()
        # Launchers end all processes as soon as one leaves: none may before this is written.
        utils.barrier()
        self.logger.close()
        if self.writer.error:
            newest = checkpoint.in_folder(self.folder)
            log.error("stopped by signal %d; where it stood could NOT be saved, the newest "
                      "checkpoint is %s", stop.signal, newest[0] if newest else "none")  # fmt: skip
            return 1
        log.info("stopped by signal %d; saved %s", stop.signal, self.writer.saved)
        log.info("go on with: %s", self._go_on_command())
        return 128 + (stop.signal or 0)

    def _go_on_command(self) -> str:
        return self._command("--resume", str(self.writer.saved))

    def _command(self, *arguments: str) -> str:
        # A checkpoint doesn't get to name code to import, so plugins are named anew.
        plugins = ("--plugin", *self.config.run.plugin) if self.config.run.plugin else ()
        return shlex.join(["python", "main.py", *arguments, *plugins])

    def _note_skipped(self, count: int, step: int, update: int) -> None:
        """Say that updates were left out, and keep the names of the first one's pictures."""
        path = self._dump_nonfinite(step, update, None)
        log.warning(
            "%d updates left out, loss or gradient not finite; the first was update %d, see %s",
            count, update, path,
        )  # fmt: skip

    def _dump_nonfinite(self, step: int, update: int, culprit: str | None) -> Path:
        """Write down what this process saw in an update that failed."""
        progress, data, processes = self.state.progress, self.data, self.processes
        first = self._samples_before(step) + processes.rank
        last = self._samples_before(step + self.config.optim.accum_steps)
        indices = data.sampler.order(progress.epoch)[first : last : processes.world_size]
        path = self.folder / f"nonfinite-rank{processes.rank}.json"
        report = {
            "update": update,
            "epoch": progress.epoch,
            "step": step,
            "learning_rate": self.state.schedule.rate(update) * self.state.schedule.factor,
            "first_nonfinite": culprit,
            "pictures": [data.train.sample_id(i) for i in indices.tolist()],
        }
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return path

    def _samples_before(self, step: int) -> int:
        """Pictures of the epoch before ``step``, in a session resumed with other batches too."""
        progress = self.state.progress
        width = self.config.data.batch_size * self.processes.world_size
        return progress.samples + (step - progress.step) * width

    def _find_culprit(self, step: int) -> tuple[str | None, str]:
        """Repeat the failed update: what goes wrong first here, and on which processes."""
        batches = self.data.batches(self.state.progress.epoch, self._samples_before(step))
        for offset, batch in enumerate(itertools.islice(batches, self.options.accum_steps)):
            culprit = engine.first_nonfinite(
                self.state, self.criterion, batch, self.options, step + offset, self.mixer
            )
            culprits = utils.gather(culprit)
            if any(culprits):
                return culprit, _somewhere(culprits)
        return None, "it did not come again on a second try"

    def _diverged(self, failure: engine.NonFinite) -> None:
        """Say where it went wrong; go back to the last checkpoint, or stop."""
        state, options = self.state, self.config.optim
        culprit, where = self._find_culprit(failure.step)
        path = self._dump_nonfinite(failure.step, failure.update, culprit)
        rate = state.schedule.rate(failure.update) * state.schedule.factor
        what = (
            f"loss or gradient not finite at update {failure.update} (epoch "
            f"{state.progress.epoch + 1}, step {failure.step + 1}), learning rate {rate:.3g}; "
            f"{where}; its pictures are listed in {path}"
        )
        self.writer.wait()
        rollbacks = state.progress.rollbacks + 1
        if options.on_nonfinite != "rollback" or rollbacks > MAX_ROLLBACKS:
            raise DivergedError(
                f"{what}. The last good weights are in {self.writer.saved or 'no checkpoint yet'}. "
                "Lower --lr, or add --clip-grad 1, --amp off, or another --on-nonfinite"
            )
        utils.barrier()
        source, content = checkpoint.load_latest(self.folder, scattered=self.config.dist.fsdp)
        state.load_state_dict(content)
        state.progress.rollbacks = rollbacks
        if options.rollback_fp32_steps:
            # Twice as many each time: the trouble may lie a little further on.
            steps = options.rollback_fp32_steps * 2 ** (rollbacks - 1)
            state.progress.precise_until = state.progress.update + steps
            how = f"in full precision for {steps} updates"
        else:
            state.schedule.factor = 0.5**rollbacks
            how = f"with the rate times {state.schedule.factor:g}"
        log.warning("%s; going back to %s, %s", what, source, how)
        self.logger.close()
        self.logger = self._open_logger()

    def _conclude(self) -> int:
        """Say what was reached and where everything is."""
        progress, config = self.state.progress, self.config
        self.writer.wait()
        if self.logger.records:
            final = {k: v for k, v in self.logger.records[-1].items() if isinstance(v, float)}
            self.logger.hyper_parameters(config.recipe(), final)
        self.logger.close()
        if self.listed_bad:
            log.warning("%d pictures could not be read and were skipped; they are listed in %s",
                        len(self.listed_bad), self.folder / BAD_IMAGES_FILE)  # fmt: skip
        if self.writer.error:
            log.error("the last checkpoint is missing: free space, then --resume auto")
            return 1
        best = self.folder / checkpoint.BEST
        if progress.best is not None:
            log.info("best     %s %.2f after epoch %d", config.save.best_metric, progress.best,
                     progress.best_epoch + 1)  # fmt: skip
        weights = best if best.exists() else self.writer.saved
        log.info("weights  %s", weights)
        log.info("curves   %s", self.folder / CURVES_FILE)
        log.info(
            "logs     %s and TensorBoard: tensorboard --logdir %s",
            self.folder / LOG_FILE,
            self.folder,
        )
        if progress.epoch < self.total_epochs and config.run.stop_at_epoch:
            log.info("next     %s", self._go_on_command())
        else:
            log.info("next     %s", self._command("--eval", "--resume", str(weights)))
        return 0


def _somewhere(culprits: list[str | None]) -> str:
    """Which process met what, e.g. ``first in the loss (process 1)``."""
    if len(culprits) == 1 or None not in culprits and len(set(culprits)) == 1:
        return f"first in {culprits[0]}"
    met = [f"{what} (process {rank})" for rank, what in enumerate(culprits) if what]
    return f"first in {'; '.join(met[:4])}{'; …' if len(met) > 4 else ''}"


def versions() -> dict[str, str]:
    """What a checkpoint was written with."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "timm": timm.__version__,
    }
