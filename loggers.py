"""The logs of a run: progress, ``log.txt``, TensorBoard, ``curves.png``.

Only the main process has a logger that does anything; the others hold one that is silent.
"""

import csv
import json
import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from errors import first_names, without_surrogates
from outputs.files import Outputs
from outputs.names import csv_cell
from pipeline.progress import ProgressBar
from utils import write_text, written_whole

if TYPE_CHECKING:
    from engine import StepReport
    from optimization.counts import Evaluation

log = logging.getLogger(__name__)

LOG_FILE = "log.txt"
CURVES_FILE = "curves.png"
PER_CLASS_FILE = "per_class.csv"
# Above this many classes a table of them is no longer read by anybody.
PER_CLASS_LIMIT = 1000
_HISTOGRAM_LIMIT = 1e19  # TensorBoard's bins end at 1e20
# How the tags begin of what TensorBoard gets after an epoch was evaluated, and after a step.
_EPOCH_TAGS, _STEP_TAGS = ("epoch/",), ("step/",)
_COLORS = {"train": "tab:gray", "test": "tab:blue", "EMA": "tab:orange"}


class RunLogger:
    """Writes a run's progress to the terminal and its folder.

    On resume ``log.txt`` and TensorBoard's files are cut back to what the checkpoint knows, so that
    neither has a gap or a duplicate.

    Args:
        folder: the run's output directory; None makes a logger that is silent.
        tensorboard: whether to write TensorBoard files.
        print_epoch: epochs between printed summaries.
        epoch: epochs done.
        update: updates done.
        within_epoch: whether the epoch of the last one isn't logged yet.
        unreported: whether the last one isn't.
        outputs: those of the run; its files are written through them.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        outputs: Outputs | None = None,
        tensorboard: bool = True,
        print_epoch: int = 1,
        epoch: int = 0,
        update: int = 0,
        within_epoch: bool = False,
        unreported: bool = False,
    ) -> None:
        self.folder = folder
        self.outputs = outputs or Outputs()
        self.print_epoch = print_epoch
        self.records: list[dict[str, Any]] = []
        self.bar: ProgressBar | None = None
        self.writer: Any = None
        self.incomplete = False  # log.txt isn't what the records say
        self.left_out: set[str] = set()  # histograms of these have been reported
        self.first_epoch = epoch + 1
        if folder is None:
            return
        self.records = [r for r in read_log(folder / LOG_FILE) if r["epoch"] <= epoch]
        if epoch or (folder / LOG_FILE).exists():
            self.incomplete = True
            self.outputs.write(folder / LOG_FILE, self._write_log)
        if tensorboard:
            from outputs.events import EventWriter

            again = _EPOCH_TAGS * within_epoch + _STEP_TAGS * unreported
            self.writer = EventWriter(folder / "tensorboard", self.outputs, update, again)

    # --- progress ---------------------------------------------------------------------------------

    def start_epoch(self, epoch: int, epochs: int, steps: int, step: int = 0) -> None:
        """Open the epoch's progress bar."""
        self._open_bar(f"epoch {epoch + 1}/{epochs}", steps, step)

    def start_evaluation(self, steps: int, name: str = "evaluate") -> None:
        """Open a progress bar for an evaluation."""
        self._open_bar(name, steps, 0)

    def _open_bar(self, title: str, total: int, initial: int) -> None:
        self.end_bar()
        self.bar = ProgressBar(title, total, initial, visible=self.folder is not None)

    def advance(self, done: int) -> None:
        """Move the progress bar to ``done`` batches."""
        if self.bar is not None:
            self.bar.to(done)

    def end_bar(self) -> None:
        """Remove the progress bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def step(self, report: "StepReport") -> None:
        """Log a step, every log interval."""
        if self.folder is None:
            return
        parts = _step_parts(report)
        if self.bar is not None and self.bar.visible:
            self.bar.say(", ".join(parts))
            self.bar.to(report.step)
        else:
            width = len(str(report.steps))
            place = f"epoch {report.epoch + 1} [{report.step:>{width}}/{report.steps}]"
            log.info("%s  %s", place, "  ".join(parts))
        if self.writer:
            for name, value in _step_scalars(report).items():
                self.writer.add_scalar(name, value, report.update)

    # --- epochs -----------------------------------------------------------------------------------

    def epoch(self, record: dict[str, Any], *, epochs: int, best: bool) -> None:
        """Write an epoch's results: a line of log.txt, TensorBoard scalars, curves, a summary."""
        self.end_bar()
        self.outputs.retry()
        if self.folder is None:
            return
        self.records.append(record)
        self.outputs.write(self.folder / LOG_FILE, self._write_log)
        if self.writer:
            for name, value in record.items():
                if isinstance(value, int | float) and name not in ("update", "n_parameters"):
                    self.writer.add_scalar(f"epoch/{name}", value, record["update"])
            self.writer.flush()
        self.outputs.write(self.folder / CURVES_FILE, self._draw)
        number = record["epoch"]
        if number == self.first_epoch or number % self.print_epoch == 0 or number == epochs:
            log.info("%s", self._summary(record, epochs, best))

    def _write_log(self, path: Path) -> None:
        """Add the last record to log.txt, or write all of them where it lacks any."""
        if self.incomplete or len(self.records) > 1 and not path.exists():
            _rewrite(path, self.records)
        else:
            self.incomplete = True
            with open(path, "a", encoding="utf-8") as file:
                file.write(_json_line(self.records[-1]))
                file.flush()
                os.fsync(file.fileno())
        self.incomplete = False

    def _draw(self, path: Path) -> None:
        draw_curves(self.records, path)

    def _summary(self, record: Mapping[str, Any], epochs: int, best: bool) -> str:
        text = f"epoch {record['epoch']}/{epochs}  train loss {record['train_loss']:.4f}"
        if "train_acc1" in record:
            text += f"  train top-1 {record['train_acc1']:.2f} %"
        text += f"  test loss {record['test_loss']:.4f}  top-1 {record['test_acc1']:.2f} %"
        if record.get("test_acc5") is not None:
            text += f"  top-5 {record['test_acc5']:.2f} %"
        if "ema_acc1" in record:
            text += f"  EMA top-1 {record['ema_acc1']:.2f} %"
        seconds = record["epoch_seconds"]
        text += f"  {seconds:.0f} s"
        left = epochs - record["epoch"]
        if record["epoch"] == self.first_epoch and left:
            text += f"  (about {duration(left * seconds)} to go)"
        return text + ("  * best" if best else "")

    # --- extras -----------------------------------------------------------------------------------

    def images(self, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        """A grid of training images (B, 3, H, W) as the model sees them, in TensorBoard."""
        if self.writer:
            from torchvision.utils import make_grid

            images = images[:32].float().cpu()
            scale = torch.tensor(std).view(1, -1, 1, 1)
            shift = torch.tensor(mean).view(1, -1, 1, 1)
            grid = make_grid((images * scale + shift).clamp(0, 1), nrow=8)
            self.writer.add_image("train/augmented", grid, 0)

    def graph(self, model: nn.Module, images: Tensor) -> None:
        """The graph of ``model`` in TensorBoard, once."""
        if self.writer and not self.writer.has_graph:
            with warnings.catch_warnings():
                # The tracer warns of every shape that the model looks at.
                warnings.simplefilter("ignore")
                self.writer.add_graph(model, images)

    def histograms(self, model: nn.Module, update: int) -> None:
        """Histograms of all weights and gradients in TensorBoard, but for those it can't show."""
        if not self.writer:
            return
        odd = []
        for name, parameter in model.named_parameters():
            parts = {"weights": parameter.detach(), "gradients": parameter.grad}
            for part, values in parts.items():
                if values is None:
                    continue
                values = values.float()
                if _has_histogram(values):
                    self.writer.add_histogram(f"{part}/{name}", values, update)
                elif f"{part}/{name}" not in self.left_out:
                    odd.append(f"{part}/{name}")
        if odd:
            self.left_out.update(odd)
            log.warning(
                "no histograms of %d tensors that are empty, not finite or beyond %g: %s",
                len(odd),
                _HISTOGRAM_LIMIT,
                first_names(odd),
            )

    def hyper_parameters(
        self, options: Mapping[str, Any], metrics: Mapping[str, float], update: int
    ) -> None:
        """The options beside the final metrics, in TensorBoard's HPARAMS."""
        if self.writer:
            plain = {
                k: v if isinstance(v, int | float) else without_surrogates(str(v))
                for k, v in options.items()
            }
            final = {f"final/{k}": v for k, v in metrics.items()}
            self.writer.add_final(plain, final, update)

    def flush(self) -> None:
        """Write what TensorBoard is to have before a checkpoint that goes on from there."""
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        """Write what is left to write."""
        self.end_bar()
        if self.writer:
            self.writer.close()
        self.outputs.close()


def _step_parts(report: "StepReport") -> list[str]:
    """What a log line says of a step."""
    parts = [f"loss {report.loss:.4f}", f"lr {report.lr:.2e}", f"grad {report.grad_norm:.2f}"]
    if report.warm_up:
        parts.append(f"first step {report.step_seconds:.1f} s")
    else:
        rate = report.images_per_second
        parts += [
            f"{rate:.{0 if rate >= 10 else 1}f} img/s",
            f"data wait {report.data_wait:.0%}",
            f"step {1000 * report.step_seconds:.0f} ms",
        ]
    parts.append(f"{report.memory / 2**30:.1f} GiB")
    if report.utilisation is not None and not report.warm_up:
        parts.append(f"MFU {report.utilisation:.0%}")
    return parts


def _step_scalars(report: "StepReport") -> dict[str, float]:
    """What TensorBoard gets of a step."""
    scalars = {
        "step/loss": report.loss,
        "step/lr": report.lr,
        "step/grad_norm": report.grad_norm,
        "step/memory_gib": report.memory / 2**30,
    }
    if not report.warm_up:
        scalars |= {
            "step/images_per_second": report.images_per_second,
            "step/data_wait": report.data_wait,
            "step/seconds": report.step_seconds,
        }
        if report.utilisation is not None:
            scalars["step/mfu"] = report.utilisation
    return scalars


def read_log(path: Path) -> list[dict[str, Any]]:
    """The epochs of a ``log.txt``, counted from 1; a last line cut off by a crash is left out."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            record = _record(line)
            if record is None:
                log.warning("%s: a line that is not whole is left out", path)
            else:
                records.append(record)
    if records and records[0]["epoch"] == 0:  # as DeiT counts
        records = [{**record, "epoch": record["epoch"] + 1} for record in records]
    return records


def _record(line: str) -> dict[str, Any] | None:
    """The epoch that a line of ``log.txt`` tells of; None if it isn't whole."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("epoch"), int) else None


def _json_line(record: Mapping[str, Any]) -> str:
    # JSON has no NaN.
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
    return json.dumps(finite) + "\n"


def _rewrite(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(_json_line(r) for r in records))


def _has_histogram(values: Tensor) -> bool:
    return values.numel() > 0 and bool((values.abs() < _HISTOGRAM_LIMIT).all())


def write_per_class(path: Path, class_names: Sequence[str], result: "Evaluation") -> None:
    """Accuracy of each class as CSV: class, images, correct, accuracy in %."""
    counts, hits = result.count_per_class.tolist(), result.correct_per_class.tolist()
    with (
        written_whole(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(("class", "images", "correct", "accuracy"))
        for name, count, right in zip(class_names, counts, hits, strict=True):
            name = csv_cell(without_surrogates(name))
            writer.writerow((name, count, right, f"{100 * right / count:.2f}" if count else ""))


def draw_curves(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss, accuracy and learning rate over the epochs, as an image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [r["epoch"] for r in records]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    panels = (
        (
            "loss",
            "cross-entropy",
            (("train_loss", "train"), ("test_loss", "test"), ("ema_loss", "EMA")),
        ),
        (
            "top-1 accuracy",
            "%",
            (("train_acc1", "train"), ("test_acc1", "test"), ("ema_acc1", "EMA")),
        ),
        ("learning rate", "", (("train_lr", "end of epoch"),)),
    )
    for axes, (title, unit, curves) in zip(figure.subplots(1, 3), panels, strict=True):
        for key, label in curves:
            values = [r.get(key) for r in records]
            if any(v is not None for v in values):
                marker = "." if len(records) < 60 else None
                values = [math.nan if v is None else v for v in values]
                axes.plot(epochs, values, label=label, marker=marker, color=_COLORS.get(label))
        axes.set(title=title, xlabel="epoch", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    with written_whole(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def duration(seconds: float) -> str:
    """A span of time as a person says it, e.g. ``2 h 05 min``."""
    seconds = int(seconds)
    if seconds < 90:
        return f"{seconds} s"
    minutes, hours = seconds // 60, seconds // 3600
    if minutes < 60:
        return f"{minutes} min {seconds % 60:02d} s"
    days = hours // 24
    return f"{days} d {hours % 24:02d} h" if days else f"{hours} h {minutes % 60:02d} min"
