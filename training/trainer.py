"""The epochs of a run: train, evaluate, log, save, stop."""

import copy
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import engine
from checkpointing.folder import checkpoints_in
from config import is_multilabel
from distributed.processes import barrier, broadcast_buffers, gather
from distributed.wrapping import is_sharded
from engine import StepReport, StepRequest
from errors import DataError, Stopped
from loggers import PER_CLASS_FILE, PER_CLASS_LIMIT, RunLogger, write_per_class
from optimization.multilabel import MultiLabelEvaluation, Result, counts_of
from optimization.state import is_better
from pipeline.cache import CachedLoader
from pipeline.dataset import Batch
from pipeline.loader import Loader
from training.announce import announce_end, announce_interruption
from training.bad_images import BadImages
from training.build import Parts, total_epochs
from training.ending import end_reached
from training.intervals import epochs_since, is_validated
from training.nonfinite import list_images, recover
from training.outlook import TimeToGo, rest_of_run
from training.profiling import Profiler
from training.resume import Start
from training.saving import Saver
from training.signals import StopRequest
from training.tracking import Tracking
from training.train_sizes import at_epoch

log = logging.getLogger(__name__)

DATA_WAIT = 0.1  # share of the time that images may be waited for without a warning


class Trainer(engine.Hooks):
    """Runs the epochs and writes what comes of them.

    Args:
        parts: what is trained, and with what.
        folder: the run's.
        start: the checkpoint that the run goes on from, if any.
    """

    def __init__(self, parts: Parts, folder: Path, start: Start | None = None) -> None:
        self.parts = parts
        self.config = parts.config
        self.state = parts.state
        self.folder = folder
        bad_images = start.content.get("bad_images", ()) if start else ()
        self.bad_images = BadImages(folder, parts.outputs, bad_images)
        tracked = start.content.get("tracking") if start else None
        is_main = parts.processes.is_main
        self.tracking = Tracking(parts.config, folder, tracked, is_main=is_main)
        self.saver = Saver(parts, folder, self.bad_images, start, self.tracking.noted)
        self.total_epochs = total_epochs(parts.config)
        self.logger = self._open_logger()
        self.stop = StopRequest()
        self._warned_of_data_wait = False
        self._steps = 0  # of the epoch under way
        self.time_to_go = TimeToGo(parts)
        updates = parts.config.log.profile if is_main else 0
        self.profiler = Profiler(updates, folder / "profile", parts.device, parts.outputs)

    def _open_logger(self) -> RunLogger:
        progress = self.state.progress
        logger = RunLogger(
            self.folder if self.parts.processes.is_main else None,
            outputs=self.parts.outputs,
            tensorboard=self.config.log.tensorboard,
            print_epoch=self.config.log.print_epoch,
            metric=self.config.save.best_metric,
            epoch=progress.epoch,
            update=progress.update,
            within_epoch=progress.samples > 0,
            unreported=progress.recent_count > 0,
            feeds=self.tracking.feeds,
        )
        if self.config.log.tb_graph:
            options, device = self.config.model, self.parts.device
            image = torch.zeros(1, options.in_chans, *options.size, device=device)
            logger.graph(self.state.model, image)
        return logger

    def fit(self, stop: StopRequest) -> int:
        """Train to the last epoch, an early stop or a signal; returns the exit code.

        Raises Stopped where a signal ends this process alone, since it can't go on with the others.
        """
        self.stop = stop
        self.saver.writer.stopping = lambda: stop.signal is not None
        try:
            return self._fit()
        except Stopped as stopped:
            code = self._leave_interrupted(alone=stopped.alone)
            if not stopped.alone:
                return code
            stopped.announced = True
            raise
        finally:
            self.tracking.feeds.close(finished=False)
            self.saver.writer.wait()

    def _fit(self) -> int:
        """Train to the last epoch, an early stop or a signal at the end of a step."""
        stop = self.stop
        if self.config.optim.on_nonfinite == "rollback" and not checkpoints_in(self.folder):
            self.saver.save()
        while not self._over():
            start, rollbacks = time.monotonic(), self.state.progress.rollbacks
            self._size_images()
            freezer = self.parts.freezer
            changed = freezer.apply(self.state.progress.epoch)
            if changed and self.parts.processes.distributed:
                self.state.rewrap()
            if not self._train_epoch():
                return self._leave_interrupted()
            if self.state.progress.rollbacks > rollbacks:
                continue
            self._finish_epoch(start)
            if stop.agreed() and not self._over():
                return self._leave_interrupted()
        return self._leave_finished()

    def _over(self) -> str:
        """Why training ends here; empty where it goes on."""
        return end_reached(self.config, self.state.progress)

    # --- an epoch ---------------------------------------------------------------------------------

    def _size_images(self) -> None:
        """Take training images of the size of this epoch."""
        parts = at_epoch(self.parts, self.state.progress.epoch)
        self.parts = self.saver.parts = self.time_to_go.parts = parts

    def _train_epoch(self) -> bool:
        """Train to the end of the epoch under way; False if asked to stop before."""
        parts, progress = self.parts, self.state.progress
        batches = parts.data.batches(progress.epoch, progress.samples)
        self._steps = steps = progress.step + len(batches)
        self.logger.start_epoch(progress.epoch, self.total_epochs, steps, progress.step)
        left = -(-len(batches) // parts.settings.accum_steps)
        last = progress.epoch + 1 >= (self.config.run.stop_at_epoch or self.total_epochs)
        try:
            with self.profiler.epoch(progress.update, left, last=last):
                return engine.train_one_epoch(
                    self.state,
                    parts.criterion,
                    self._watched(batches),
                    parts.settings,
                    steps=steps,
                    mixer=parts.mixer_now,
                    hooks=self,
                )
        except engine.NonFinite as failure:
            self.logger.end_bar()
            self.saver.writer.wait()
            recover(parts, self.folder, failure, self.saver.writer.saved)
            self.logger.close()
            self.logger = self._open_logger()
            return True
        except DataError:
            if not self.stop.signal:
                raise
            # The signal went to the workers too. Other processes may be in a step.
            raise Stopped(self.stop.signal, alone=parts.processes.distributed) from None

    def _watched(self, batches: Any) -> Iterator[Batch]:
        """Pass batches through; note bad images, move the bar, show the first batch."""
        for number, batch in enumerate(self.bad_images.watch(self._awaited(batches))):
            self.logger.advance(self.state.progress.step)
            if number == 0 and self.state.progress.update == 0:
                self._show(batch)
            yield batch

    def _awaited(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches through; a signal ends the wait for one."""
        iterator = iter(batches)
        while True:
            with self.stop.waiting():
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def _show(self, batch: Batch) -> None:
        """The images of ``batch`` as the model sees them, in TensorBoard."""
        parts = self.parts
        images = parts.settings.inputs(batch)
        if parts.mixer_now is not None:
            images, _ = parts.mixer_now(images.clone(), parts.settings.place(batch.targets), 0)
        shown = parts.preprocessing
        self.logger.images(images, shown.mean, shown.std, shown.bit_depth)

    def report(self, report: StepReport) -> None:
        """Log a step; say once what to change where images keep the device waiting."""
        self.logger.step(report)
        slow = report.data_wait > DATA_WAIT and not report.warm_up
        # The options are those of all processes: one of them is enough to say it.
        if slow and self.parts.processes.is_main and not self._warned_of_data_wait:
            self._warned_of_data_wait = True
            log.warning(
                "%.0f %% of the time goes into waiting for images: %s",
                100 * report.data_wait,
                "; ".join(self.parts.data.ways_to_feed_faster(self.config)),
            )

    def request(self) -> StepRequest:
        """What all processes do after this update: stop, save or go on."""
        self.profiler.step()
        self.time_to_go.after_update()
        progress = self.state.progress
        if self.config.log.tb_histograms and progress.step >= self._steps:
            # Before a checkpoint, since none holds gradients.
            self.logger.histograms(self.state.model, progress.update)
        if self.stop.agreed():
            return StepRequest.STOP
        return StepRequest.SAVE if self.saver.due() else StepRequest.CONTINUE

    def save(self) -> None:
        self.logger.flush()
        self.saver.save()

    def skipped(self, count: int, step: int, update: int) -> None:
        """Say that updates were left out, and keep the names of the first one's images."""
        path = list_images(self.parts, self.folder, step, update, None)
        log.warning(
            "%d updates left out, loss or gradient not finite; the first was update %d, see %s",
            count,
            update,
            path,
        )

    # --- after an epoch ---------------------------------------------------------------------------

    def _finish_epoch(self, start: float) -> None:
        """Evaluate if it is time, log and save after an epoch that began at ``start`` (monotonic
        seconds)."""
        state, config, progress = self.state, self.config, self.state.progress
        record: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "train_lr": state.schedule.last,
            "train_loss": progress.loss_sum / max(progress.loss_count, 1),
        }
        if not is_multilabel(config):
            record["train_acc1"] = 100 * progress.hits / max(progress.answers, 1)
        best, number = False, progress.epoch + 1
        if is_validated(config, number):
            scores, results = self._evaluate_all()
            record |= scores
            best = self._note_score(record[config.save.best_metric], results)
            since = epochs_since(config, number)
            state.schedule.end_epoch(record[config.save.best_metric], since)
        self.bad_images.gather(is_main=self.parts.processes.is_main)
        record |= {
            "n_parameters": self.parts.summary.parameters,
            "update": progress.update,
            "skipped_updates": progress.skipped,
            "bad_images": len(self.bad_images.listed),
            "epoch_seconds": time.monotonic() - start,
        }
        progress.end_epoch()
        to_go = rest_of_run(self.parts, record["epoch_seconds"])
        self.logger.epoch(record, epochs=self.total_epochs, best=best, to_go=to_go)
        if self.parts.processes.is_main:
            for text in self.parts.data.news():
                log.info("%s", text)
        if best or self._over() or progress.epoch % config.save.save_every == 0:
            self.saver.save(record, best=best)

    def _evaluate_all(self) -> tuple[dict[str, Any], dict[str, Result]]:
        """Scores of the model and of its average by log key; the evaluations by their prefix."""
        modules = {"test": self.state.model}
        if self.state.ema:
            modules["ema"] = self.state.ema.module
        record: dict[str, Any] = {}
        results = {}
        for prefix, module in modules.items():
            # Each process has batch statistics of its own; those that are saved are evaluated.
            broadcast_buffers(module)
            title = "evaluate" if prefix == "test" else "evaluate EMA"
            results[prefix] = result = self._evaluate(module, title)
            record |= {f"{prefix}_{name}": score for name, score in result.scores().items()}
            if isinstance(result, MultiLabelEvaluation):
                entry = "thresholds" if prefix == "test" else "ema_thresholds"
                self.saver.thresholds[entry] = result.thresholds.tolist()
        return record, results

    def _evaluate(self, model: nn.Module, title: str) -> Result:
        parts, loader = self.parts, self.parts.data.val_loader
        self.logger.start_evaluation(len(loader), title)
        if next(model.parameters()).device != parts.settings.device:
            # A moving average that lives in host memory.
            model = copy.deepcopy(model).to(parts.settings.device)
        sharded = is_sharded(model)
        try:
            result = engine.evaluate(
                model,
                self._in_turn(loader, together=sharded),
                parts.settings,
                num_classes=len(parts.data.class_names),
                batch_size=loader.batch_size,
                shared=self.config.dist.dist_eval,
                progress=self.logger.advance,
                counts=counts_of(
                    self.config.data.task, len(parts.data.class_names), parts.settings.device
                ),
            )
        except Stopped:
            if sharded:
                model.reshard()  # as an evaluation that ends does
            raise
        self.logger.end_bar()
        if result.count == 0:
            raise DataError("no validation image could be read")
        return result

    def _in_turn(self, loader: Loader | CachedLoader, *, together: bool) -> Iterator[Batch | None]:
        """Batches for an evaluation, which all processes leave at the same one if any is asked to.

        Processes may have one batch less than others. Those of a model that they compute
        ``together`` get None for it.
        """
        batches = self.bad_images.watch(self._awaited(loader))
        for _ in range(max(gather(len(loader)))):
            if self.stop.agreed():
                raise Stopped(self.stop.signal)
            batch = next(batches, None)
            if batch is not None or together:
                yield batch

    def _note_score(self, score: float, results: dict[str, Result]) -> bool:
        """Whether ``score`` is the best so far; then the results per class are written."""
        progress, options = self.state.progress, self.config.save
        lower = options.best_metric.endswith("loss")
        best = is_better(score, progress.best, lower=lower)
        delta = options.early_stop_delta
        if is_better(score, progress.reference, lower=lower, delta=delta):
            progress.reference, progress.improved_epoch = score, progress.epoch + 1
        if best:
            progress.best, progress.best_epoch = score, progress.epoch + 1
            shown = results["ema" if options.best_metric.startswith("ema_") else "test"]
            names = self.parts.data.class_names
            if len(names) <= PER_CLASS_LIMIT and self.parts.processes.is_main:
                self.parts.outputs.write(
                    self.folder / PER_CLASS_FILE, lambda path: write_per_class(path, names, shown)
                )
        return best

    # --- the end ----------------------------------------------------------------------------------

    def _leave_interrupted(self, *, alone: bool = False) -> int:
        """Save where training stands, say how to go on; returns the exit code.

        A process that leaves ``alone`` saves what it can without the others.
        """
        self.logger.end_bar()
        lost = alone and is_sharded(self.state.model)
        if not lost:
            self.logger.flush()
            self.saver.save_now()
        self.tracking.feeds.close(finished=False)
        # Launchers end all processes as soon as one leaves: none may before this is written.
        if not alone:
            barrier()
        self.logger.close()
        number = self.stop.signal
        return announce_interruption(self.config, self.folder, self.saver, number, lost=lost)

    def _leave_finished(self) -> int:
        """Wait for the last checkpoint, say what was reached; returns the exit code."""
        if self.state.progress.epoch < self.total_epochs:
            log.info("%s", self._over())
        self.saver.writer.finish()
        if self.logger.records:
            final = {k: v for k, v in self.logger.records[-1].items() if isinstance(v, float)}
            update = self.state.progress.update
            self.logger.hyper_parameters(self.config.recipe(), final, update)
        self.logger.close()
        stop = self.stop
        self.tracking.feeds.close(finished=True, stopping=lambda: stop.signal is not None)
        return announce_end(self.parts, self.folder, self.saver, len(self.bad_images.listed))
