"""Average the weights of several checkpoints of a run: often better than each of them.

Means of all floating-point weights ("Averaging Weights Leads to Wider Optima and Better
Generalization", arXiv:1803.05407); counters are the newest one's. Means of batch-norm statistics
are an approximation: --update-bn gathers them anew from training images.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

import inference
from checkpointing.files import (
    MULTILABEL,
    load_checkpoint,
    named,
    save_checkpoint,
    task_of,
    weights_of,
)
from checkpointing.folder import checkpoints_in
from config.metrics import metric_key
from errors import CheckpointError, OptionError, UserError
from outputs.console import say
from tools.common import command, trained
from tools.common.labels import is_multilabel
from tools.multilabel.thresholds import best_thresholds

Weights = Mapping[str, Tensor]


def average(weights: Sequence[Weights]) -> dict[str, Tensor]:
    """The mean of several state dicts, summed in float64; whole numbers are the last one's.

    Raises CheckpointError if they belong to different models.
    """
    last = weights[-1]
    for other in weights:
        _check_same(other, last)
    return {
        name: _mean([w[name] for w in weights]) if value.is_floating_point() else value.clone()
        for name, value in last.items()
    }


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(tensors[0].dtype)


def _check_same(left: Weights, right: Weights) -> None:
    differing = [n for n in left.keys() & right.keys() if left[n].shape != right[n].shape]
    differing += left.keys() ^ right.keys()
    if differing:
        raise CheckpointError(
            f"the checkpoints hold different models ({sorted(differing)[0]} differs): "
            "average those of one run"
        )


def average_checkpoints(paths: Sequence[Path], *, ema: bool = False) -> dict[str, Any]:
    """A checkpoint with the mean of several; all but the weights comes from the last one.

    Nothing can go on from it: it holds no optimiser. ``ema`` takes the means of the moving
    averages.
    """
    contents = [load_checkpoint(path) for path in paths]
    names = contents[-1].get("class_names")
    for path, content in zip(paths, contents, strict=True):
        if content.get("class_names") != names:
            raise CheckpointError(f"{path} knows other classes than {paths[-1]}")
    try:
        weights = average([weights_of(content, ema=ema) for content in contents])
    except CheckpointError as error:
        raise CheckpointError(f"{', '.join(map(str, paths))}: {error}") from None
    kept = ("config", "class_names", "preprocessing", "split", "versions")
    described = {k: contents[-1][k] for k in kept if k in contents[-1]}
    return {"model": weights, "averaged": [path.name for path in paths], **described}


def chosen(folder: Path, count: int, *, best: str | None = None) -> list[Path]:
    """The last ``count`` checkpoints of a run, or the best by the metric ``best``; oldest first."""
    found = checkpoints_in(folder)[::-1]
    if best:
        scores = {path: _score(path, best) for path in found}
        found = [path for path in found if scores[path] is not None]
        taken = sorted(found, key=scores.__getitem__, reverse=best.endswith("loss"))[-count:]
        found = [path for path in found if path in taken]
    if len(found) < count:
        what = f"checkpoints with {best}" if best else "checkpoints"
        raise UserError(
            f"{folder} holds {len(found)} {what}, not {count}: train with a larger --keep"
        )
    return found[-count:]


def _score(path: Path, metric: str) -> float | None:
    return load_checkpoint(path).get("metrics", {}).get(metric)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the model gathers batch statistics."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


# --- command line ---------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("average", __doc__)
    parser.add_argument("inputs", nargs="+", type=Path, help="a run's folder, or checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="the .pth file to write")
    parser.add_argument("--last", type=command.positive, help="the newest so many of the folder")
    parser.add_argument("--best", type=command.positive, help="the best so many of the folder")
    parser.add_argument(
        "--metric",
        type=metric_key,
        help="what is best, a key of log.txt (default: test_acc1; multi-label: test_map)",
    )
    parser.add_argument("--ema", action="store_true", help="average the moving averages")
    parser.add_argument(
        "--update-bn", action="store_true", help="gather batch-norm statistics from the images"
    )
    parser.add_argument("--device", default="auto", help="of --update-bn")
    trained.add_data_arguments(parser)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    output = arguments.output
    if output.exists():
        raise UserError(f"{output} exists: remove it, or name another")
    paths = _paths(arguments)
    content = average_checkpoints(paths, ema=arguments.ema)
    with named(paths[-1]):
        classifier = inference.from_content(content) if "config" in content else None
    if arguments.update_bn:
        if classifier is None:
            raise OptionError("update_bn", "needs training checkpoints, not weights alone")
        _update_statistics(arguments, classifier, content)
    elif classifier and has_batch_norm(classifier.model):
        print("note: batch-norm statistics are means; --update-bn gathers them anew")
    if classifier and is_multilabel(classifier):
        _choose_thresholds(arguments, classifier, content)
    try:
        save_checkpoint(output, content)
    except OSError as error:
        raise command.not_written(output, error) from None
    say(f"{output}: the mean of {', '.join(map(str, paths))}")


def _paths(arguments: argparse.Namespace) -> list[Path]:
    folders = [path for path in arguments.inputs if (path.is_dir() and path.suffix != ".shards")]
    if not folders:
        if arguments.last or arguments.best:
            raise UserError("--last and --best choose from a run's folder: name that")
        return arguments.inputs
    if len(arguments.inputs) > 1 or bool(arguments.last) == bool(arguments.best):
        raise UserError("of one folder, with --last K or --best K; or name checkpoints")
    count = arguments.last or arguments.best
    return chosen(
        folders[0], count, best=_metric(arguments, folders[0]) if arguments.best else None
    )


def _metric(arguments: argparse.Namespace, folder: Path) -> str:
    """What is best: as asked, else what runs of this task go by."""
    found = checkpoints_in(folder)
    if arguments.metric or not found:
        return arguments.metric or "test_acc1"
    several = task_of(load_checkpoint(found[-1])) == MULTILABEL
    return "test_map" if several else "test_acc1"


def _choose_thresholds(
    arguments: argparse.Namespace, classifier: inference.Classifier, content: dict[str, Any]
) -> None:
    """Choose thresholds on the validation images: those of the checkpoints are not the mean's."""
    model = trained.on_device(classifier, content, arguments.device)
    try:
        loader = trained.loader(arguments, model)
    except UserError as error:
        if arguments.data_path or arguments.data_set:
            raise
        say(f"note: its thresholds are 0.5, for the run's images are not here ({error})")
        return
    content["thresholds"] = best_thresholds(model, loader)


def _update_statistics(
    arguments: argparse.Namespace, classifier: inference.Classifier, content: dict[str, Any]
) -> None:
    model = trained.on_device(classifier, content, arguments.device)
    loader = trained.loader(arguments, model, training=True)
    batches = (batch.images for batch in command.progress(loader, "batches", total=len(loader)))
    update_bn((images for images in batches if len(images)), classifier.model, model.device)
    content["model"] = {k: v.cpu() for k, v in classifier.model.state_dict().items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
