"""Look into a checkpoint or a weight file: what it holds, every layer, the gradients of a batch.

Files of any origin are read, without running code in them.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inference
from bounded import size_text
from checkpointing.files import named, weights_of
from errors import UserError, first_names
from outputs.console import say
from outputs.names import any_glyphs, chart_label
from tools.common import command, trained
from tools.common.recipe import is_off_default

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Layer(NamedTuple):
    """One tensor of a model."""

    name: str
    shape: tuple[int, ...]
    parameters: int
    dtype: str
    mean: float
    std: float
    nonfinite: int
    """Values that are NaN or infinite; mean and std are of the others."""


class Gradient(NamedTuple):
    """The gradient of one parameter."""

    name: str
    gradient: float
    """Root mean square."""
    weight: float
    """Root mean square of the parameter itself."""


# --- what a file holds ----------------------------------------------------------------------------


def summary(path: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values: size, place in training, metrics, options off their defaults, parts."""
    found: dict[str, Any] = {"file": path}
    found |= {"bytes": size} if (size := _size(Path(path).expanduser())) else {}
    progress = content.get("progress")
    if isinstance(progress, Mapping):
        found |= {name: progress.get(name) for name in ("epoch", "samples", "update")}
        found["best"] = progress.get("best")
    for name in ("epoch", "global_step", "arch"):
        # DeiT's and timm's checkpoints.
        if isinstance(content.get(name), int | str):
            found.setdefault(name, content[name])
    for name in ("metrics", "preprocessing", "versions", "averaged"):
        if content.get(name):
            found[name] = content[name]
    if content.get("class_names"):
        found["classes"] = list(content["class_names"])
    if isinstance(content.get("config"), Mapping):
        found["options"] = {k: v for k, v in content["config"].items() if is_off_default(k, v)}
    found["parts"] = {name: _bytes(value) for name, value in content.items() if _bytes(value)}
    return found


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size if path.is_file() else 0


def _bytes(value: object) -> int:
    """Of all tensors in ``value``, at any depth."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def layers(weights: Mapping[str, Tensor]) -> list[Layer]:
    """A row for each tensor, in the file's order."""
    return [_layer(name, value) for name, value in weights.items()]


def _layer(name: str, value: Tensor) -> Layer:
    values = value.detach().double().flatten()
    finite = values[torch.isfinite(values)]
    mean = float(finite.mean()) if len(finite) else math.nan
    std = float(finite.std(correction=0)) if len(finite) else math.nan
    kind = str(value.dtype).removeprefix("torch.")
    nonfinite = len(values) - len(finite)
    return Layer(name, tuple(value.shape), value.numel(), kind, mean, std, nonfinite)


# --- gradients ------------------------------------------------------------------------------------


def gradient_flow(model: nn.Module, images: Tensor, targets: Tensor) -> list[Gradient]:
    """Gradients of the cross-entropy of one batch, from the first layer to the last.

    The model is in evaluation mode: without dropout, with the batch-norm statistics it has. Its own
    gradients are not touched.

    Args:
        model: gives (B, C) logits.
        images: (B, 3, H, W).
        targets: (B,).
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    with torch.enable_grad():
        loss = F.cross_entropy(model(images), targets)
        gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return [
        Gradient(name, 0.0 if g is None else _rms(g), _rms(p))
        for (name, p), g in zip(named, gradients, strict=True)
    ]


def _rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def flow_chart(flow: Sequence[Gradient]) -> "Figure":
    """Root mean square of gradients and weights of all parameters, on a logarithmic axis."""
    from matplotlib.figure import Figure

    shown = [g for g in flow if not g.name.endswith("bias")]
    figure = Figure(figsize=(max(7.0, 0.16 * len(shown)), 5), layout="constrained")
    axes = figure.subplots()
    places = range(len(shown))
    axes.plot(places, [g.gradient or math.nan for g in shown], "o-", label="gradient")
    axes.plot(places, [g.weight or math.nan for g in shown], "s:", color="tab:gray", label="weight")
    axes.set_yscale("log")
    axes.set_xticks(places, [chart_label(g.name) for g in shown], rotation=90, fontsize=7)
    axes.set(ylabel="root mean square", title="one batch, biases left out")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


# --- command line ---------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("inspect", __doc__)
    trained.add_model_arguments(parser)
    parser.add_argument("--layers", action="store_true", help="a row for each tensor")
    parser.add_argument(
        "--gradients", type=Path, metavar="PNG", help="draw and list the gradients of one batch"
    )
    parser.add_argument("--json", action="store_true", help="print all as JSON")
    trained.add_data_arguments(parser)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    path = arguments.model
    if path.endswith(".onnx"):
        raise UserError(f"{path}: an ONNX file is looked into with onnx or netron")
    content = inference.read_content(path)
    with named(path):
        weights = weights_of(content, ema=arguments.ema)
    table = layers(weights)
    found = summary(path, content)
    found["tensors"] = len(table)
    found["values"] = sum(layer.parameters for layer in table)
    found["nonfinite"] = [layer.name for layer in table if layer.nonfinite]
    flow = _flow(arguments) if arguments.gradients else None
    if arguments.json:
        rows = {"layers": [_finite(layer._asdict()) for layer in table]}
        rows |= {"gradients": [g._asdict() for g in flow]} if flow else {}
        print(json.dumps(found | rows, indent=2, default=str))
        return
    lines = [*_lines(found), *(_table(table) if arguments.layers else ())]
    for line in (*lines, *(_flow_table(flow) if flow else ())):
        say(line)
    if flow:
        say(f"gradients: {arguments.gradients}")


def _flow(arguments: argparse.Namespace) -> list[Gradient]:
    model = trained.open_model(arguments)
    batch = next((b for b in trained.loader(arguments, model) if len(b.targets)), None)
    if batch is None:
        raise UserError("no image could be read")
    flow = gradient_flow(
        model.classifier.model, batch.images.to(model.device), batch.targets.to(model.device)
    )
    try:
        with command.written(arguments.gradients) as path, any_glyphs():
            flow_chart(flow).savefig(path, dpi=120)
    except ValueError as error:  # no format of this name
        raise UserError(f"{arguments.gradients} can't be written: {error}") from None
    return flow


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    # JSON has no NaN.
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    for name, value in found.items():
        if name == "bytes":
            yield f"{'size':<14}{size_text(value)}"
        elif name == "parts":
            text = ", ".join(f"{part} {size_text(size)}" for part, size in value.items())
            yield f"{name:<14}{text if len(value) < 12 else f'{len(value)} tensors'}"
        elif name == "classes":
            yield f"{name:<14}{len(value)}: {first_names(value, 8)}"
        elif name == "nonfinite":
            yield f"{'not finite':<14}{', '.join(value) or 'nothing'}"
        elif isinstance(value, Mapping):
            yield f"{name:<14}{', '.join(f'{k} {_short(v)}' for k, v in value.items())}"
        elif value is not None:
            yield f"{name:<14}{_short(value)}"


def _short(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _table(table: Sequence[Layer]) -> Iterator[str]:
    width = max(len(layer.name) for layer in table)
    yield ""
    yield f"{'tensor':<{width}}  {'shape':<16}{'values':>11}  {'type':<9}{'mean':>10}{'std':>10}"
    for layer in table:
        shape = "×".join(map(str, layer.shape)) or "scalar"
        broken = f"  {layer.nonfinite} not finite" if layer.nonfinite else ""
        yield (
            f"{layer.name:<{width}}  {shape:<16}{layer.parameters:>11,}  {layer.dtype:<9}"
            f"{layer.mean:>10.2e}{layer.std:>10.2e}{broken}"
        )


def _flow_table(flow: Sequence[Gradient]) -> Iterator[str]:
    width = max(len(g.name) for g in flow)
    yield ""
    yield f"{'parameter':<{width}}  {'gradient':>10}{'weight':>10}{'ratio':>10}"
    for name, gradient, weight in flow:
        ratio = f"{gradient / weight:.2e}" if weight else "-"
        yield f"{name:<{width}}  {gradient:>10.2e}{weight:>10.2e}{ratio:>10}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv, reader_ends=True)


if __name__ == "__main__":
    sys.exit(main())
