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
from outputs.trackers.feed import Feeds
from pipeline.progress import ProgressBar
from utils import write_text, written_whole

if TYPE_CHECKING:
    from engine import StepReport
    from optimization.multilabel import Result

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


# What the summary of an epoch shows of its record, where it has it, and under which name.
_SUMMARY = {
    "train_loss": "train loss",
    "train_acc1": "train top-1",
    "test_loss": "test loss",
    "test_acc1": "top-1",
    "test_acc5": "top-5",
    "ema_acc1": "EMA top-1",
    "test_map": "mAP",
    "test_macro_f1_best": "best macro F1",
    "ema_map": "EMA mAP",
}


_SEVERAL_LABELS = (
    "mAP and macro F1",
    "%",
    (
        *(("test_map", "test"), ("ema_map", "EMA")),
        ("test_macro_f1", "F1 at 0.5"),
        ("test_macro_f1_best", "F1 at best thresholds"),
    ),
)


class RunLogger:
    """Writes a run's progress to the terminal and its folder.

    On resume ``log.txt`` and TensorBoard's files are cut back to what the checkpoint knows, so that
    neither has a gap or a duplicate.

    Args:
        folder: the run's output directory; None makes a logger that is silent.
        tensorboard: whether to write TensorBoard files.
        print_epoch: epochs between printed summaries.
        metric: the log key that decides which epoch is the best; summary and curves have it.
        epoch: epochs done.
        update: updates done.
        within_epoch: whether the epoch of the last one isn't logged yet.
        unreported: whether the last one isn't.
        outputs: those of the run; its files are written through them.
        feeds: trackers, which get the same scalars as TensorBoard; whoever made them closes them.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        outputs: Outputs | None = None,
        tensorboard: bool = True,
        print_epoch: int = 1,
        metric: str = "",
        epoch: int = 0,
        update: int = 0,
        within_epoch: bool = False,
        unreported: bool = False,
        feeds: Feeds | None = None,
    ) -> None:
        self.folder = folder
        self.feeds = feeds or Feeds()
        self.outputs = outputs or Outputs()
        self.print_epoch = print_epoch
        self.metric = metric
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
        on_bar = self.bar is not None and self.bar.visible
        if on_bar:
            self.bar.say(", ".join(parts))
            self.bar.to(report.step)
        width = len(str(report.steps))
        place = f"epoch {report.epoch + 1} [{report.step:>{width}}/{report.steps}]"
        log.info("%s  %s", place, "  ".join(parts), extra={"on_bar": on_bar})
        scalars = _step_scalars(report)
        self.feeds.log(scalars, report.update)
        if self.writer:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, report.update)

    # --- epochs -----------------------------------------------------------------------------------

    def epoch(self, record: dict[str, Any], *, epochs: int, best: bool, to_go: float = 0.0) -> None:
        """Write an epoch's results: a line of log.txt, TensorBoard scalars, curves, a summary.

        ``to_go``: seconds that the rest of the run takes, if that is known.
        """
        self.end_bar()
        self.outputs.retry()
        if self.folder is None:
            return
        self.records.append(record)
        self.outputs.write(self.folder / LOG_FILE, self._write_log)
        scalars = {
            f"epoch/{name}": value
            for name, value in record.items()
            if isinstance(value, int | float) and name not in ("update", "n_parameters")
        }
        self.feeds.log(scalars, record["update"], epoch=True)
        if self.writer:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, record["update"])
            self.writer.flush()
        self.outputs.write(self.folder / CURVES_FILE, self._draw)
        number = record["epoch"]
        if number == self.first_epoch or number % self.print_epoch == 0 or number == epochs:
            log.info("%s", self._summary(record, epochs, best, to_go))

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
        draw_curves(self.records, path, self.metric)

    def _summary(self, record: Mapping[str, Any], epochs: int, best: bool, to_go: float) -> str:
        text = f"epoch {record['epoch']}/{epochs}"
        scores = _SUMMARY
        if self.metric not in scores:
            scores = {**scores, self.metric: self.metric}
        for key, name in scores.items():
            if (value := record.get(key)) is not None:
                text += f"  {name} " + _score_text(key, value)
        text += f"  {record['epoch_seconds']:.0f} s"
        if record["epoch"] == self.first_epoch and to_go:
            text += f"  (about {duration(to_go)} to go)"
        return text + ("  * best" if best else "")

    # --- extras -----------------------------------------------------------------------------------

    def images(
        self, images: Tensor, mean: Sequence[float], std: Sequence[float], bit_depth: int = 8
    ) -> None:
        """A grid of training images (B, C, H, W) as the model sees them, in TensorBoard; bands and
        16 bits as ``augmentation.bands.composite`` has them."""
        if self.writer:
            from torchvision.transforms.functional import pil_to_tensor
            from torchvision.utils import make_grid

            from augmentation.bands import composite

            images = images[:32].float().cpu()
            scale = torch.tensor(std).view(1, -1, 1, 1)
            shift = torch.tensor(mean).view(1, -1, 1, 1)
            images = (images * scale + shift).clamp(0, 1)
            if images.shape[1] not in (1, 3) or bit_depth != 8:
                images = torch.stack([pil_to_tensor(composite(x.numpy())) for x in images]) / 255
            grid = make_grid(images, nrow=8)
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


def _score_text(key: str, value: float) -> str:
    return f"{value:.4f}" if key.endswith("loss") else f"{value:.2f} %"


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


def write_per_class(path: Path, class_names: Sequence[str], result: "Result") -> None:
    """The results of each class as CSV, see ``Evaluation.table``."""
    with (
        written_whole(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        header, *rows = result.table(class_names)
        writer.writerow(header)
        writer.writerows((csv_cell(without_surrogates(name)), *row) for name, *row in rows)


def draw_curves(records: Sequence[Mapping[str, Any]], path: Path, metric: str = "") -> None:
    """Loss, accuracy and learning rate over the epochs, as an image; ``metric``, another log key,
    is drawn beside its kind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

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
    if any("test_map" in record for record in records):
        panels = (("loss", "binary cross-entropy", panels[0][2]), _SEVERAL_LABELS, panels[2])
    drawn = {key for _, _, curves in panels for key, _ in curves}
    for axes, (title, unit, curves) in zip(figure.subplots(1, 3), panels, strict=True):
        if metric not in drawn and (unit == "%") != metric.endswith("loss") and unit:
            curves = (*curves, (metric, metric))
        for key, label in curves:
            # Epochs without a validation have no such key; a score that isn't finite is None.
            points = [(r["epoch"], r[key]) for r in records if key in r]
            if any(v is not None for _, v in points):
                marker = "." if len(points) < 60 else None
                epochs = [epoch for epoch, _ in points]
                values = [math.nan if v is None else v for _, v in points]
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
