"""The models there are, and what one of them consists of.

``list`` names ours, timm's and torchvision's; ``info`` builds one without weights.
"""

import argparse
import fnmatch
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

import models
from architectures.factory import has_published_weights, published_cfg
from architectures.library_model import TORCHVISION
from architectures.registry import ALIASES
from architectures.sizes import height_width, size_text
from architectures.summary import ModelSummary
from architectures.torchvision_models import names as torchvision_names
from architectures.tracing import traced
from checkpointing.variants import variant_of
from config import by_name, convert
from errors import UserError, did_you_mean
from outputs.console import say
from tools.common import command
from training.plugins import import_plugins

COUNTED = 40  # of so many names the parameters are counted, which builds each
_OURS = ("models", "cait_models", "architectures")


class Entry(NamedTuple):
    """A model of the list."""

    name: str
    origin: str
    """"here", "timm", "torchvision" or "plug-in"."""
    size: str
    """Of its images, in pixels."""
    parameters: int | None
    """None where it wasn't counted."""
    published: bool
    """Whether there are weights to start from."""


def find(patterns: Sequence[str]) -> list[Entry]:
    """The models whose names match a pattern, in the order of names; short names count too.

    Raises UserError for a pattern that none matches.
    """
    known = [*timm.list_models(), *(TORCHVISION + name for name in torchvision_names())]
    found: set[str] = set()
    for pattern in patterns or ["*"]:
        matching = {name for name in known if fnmatch.fnmatchcase(name.lower(), pattern.lower())}
        matching |= {full for short, full in ALIASES.items() if fnmatch.fnmatchcase(short, pattern)}
        if not matching:
            names = [*ALIASES, *known]
            hint = did_you_mean(
                pattern.strip("*"), names, most=3, cutoff=0.4, otherwise="quote a pattern"
            )
            raise UserError(f"no model is called {pattern!r}: {hint}")
        found |= matching
    return [_entry(name, len(found) <= COUNTED) for name in sorted(found, key=str.lower)]


def _entry(name: str, count: bool) -> Entry:
    cfg = published_cfg(name)
    parameters = None
    if count:
        built = _without_values(name, cfg["num_classes"] or 1000, {})
        parameters = sum(p.numel() for p in built.parameters())
    sides = height_width(cfg["input_size"][1:])
    return Entry(name, _origin(name), size_text(sides), parameters, has_published_weights(cfg))


def _origin(name: str) -> str:
    if name.startswith(TORCHVISION):
        return "torchvision"
    module = timm.models.model_entrypoint(name).__module__.partition(".")[0]
    return "here" if module in _OURS else "timm" if module == "timm" else "plug-in"


def _without_values(name: str, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    """The model on torch's meta device where it can be, as its shapes alone are looked at."""
    arguments = {"required": ("input_size",), **arguments}
    arguments.setdefault("input_size", published_cfg(name)["input_size"][1:])
    arguments["input_size"] = tuple(arguments["input_size"])
    try:
        with torch.device("meta"):
            return models.build_model(name, num_classes, **arguments)
    except (NotImplementedError, RuntimeError):  # its making looks at values
        return models.build_model(name, num_classes, **arguments)


class Layer(NamedTuple):
    """A module of a model."""

    name: str
    kind: str
    """Its class."""
    output: tuple[int, ...] | None
    """Of one image; empty: several tensors, None: it isn't called by itself."""
    parameters: int


def layers(model: nn.Module, shapes: dict[str, tuple[int, ...]], depth: int) -> Iterator[Layer]:
    """The modules down to ``depth`` levels, in the model's order; ``shapes`` are those of
    :func:`architectures.tracing.traced`."""
    for name, module in model.named_modules():
        if name and name.count(".") < depth:
            count = sum(p.numel() for p in module.parameters())
            yield Layer(name, type(module).__name__, shapes.get(name), count)


# --- command line ---------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("models", __doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="list | info")
    listing = actions.add_parser("list", help="names, sizes, parameters, whether there are weights")
    listing.add_argument("patterns", nargs="*", metavar="PATTERN", help="e.g. 'deit*', quoted")
    info = actions.add_parser("info", help="parameters, GMACs and the output of each layer")
    info.add_argument("name", help="as --model takes it")
    info.add_argument("--num-classes", type=command.positive, default=1000)
    info.add_argument("--input-size", nargs="+", help="other sides than the model's own, pixels")
    info.add_argument("--model-kwargs", nargs="+", metavar="NAME=VALUE", default=[])
    info.add_argument("--global-pool", default="")
    info.add_argument("--depth", type=command.positive, default=2, help="levels of layers shown")
    for action in (listing, info):
        action.add_argument("--json", action="store_true", help="print all as JSON")
        action.add_argument(
            "--plugin", action="append", default=[], help="Python file that registers models"
        )
    return parser


def _run(arguments: argparse.Namespace) -> None:
    import_plugins(arguments.plugin)
    if arguments.action == "list":
        _list(arguments)
    else:
        _info(arguments)


def _list(arguments: argparse.Namespace) -> None:
    entries = find(arguments.patterns)
    if arguments.json:
        print(json.dumps([entry._asdict() for entry in entries], indent=2))
        return
    width = max(len(entry.name) for entry in entries)
    say(f"{'model':<{width}}  {'of':<12}{'pixels':>8}{'M parameters':>14}  weights")
    for entry in entries:
        count = "-" if entry.parameters is None else f"{entry.parameters / 1e6:.2f}"
        published = "published" if entry.published else "-"
        say(f"{entry.name:<{width}}  {entry.origin:<12}{entry.size:>8}{count:>14}  {published}")
    if len(entries) > COUNTED:
        say(f"{len(entries)} models: the parameters of up to {COUNTED} are counted")


def _info(arguments: argparse.Namespace) -> None:
    name = models.resolve_name(arguments.name)
    cfg = published_cfg(name)
    size = height_width(cfg["input_size"][1:])
    if arguments.input_size:
        size = height_width(convert(by_name("input_size"), arguments.input_size))
    form = {"model_kwargs": arguments.model_kwargs, "global_pool": arguments.global_pool}
    values = {"input_size": size, "variant": variant_of(form)}
    model = _without_values(name, arguments.num_classes, values)
    summary, shapes = traced(model, size)
    table = list(layers(model, shapes, arguments.depth))
    found = _described(name, size, summary, has_published_weights(cfg))
    if arguments.json:
        print(json.dumps(found | {"layers": [layer._asdict() for layer in table]}, indent=2))
        return
    for key, value in found.items():
        say(f"{key:<14}{value:,}" if isinstance(value, int) else f"{key:<14}{value}")
    say("")
    width = max(len(layer.name) for layer in table)
    say(f"{'layer':<{width}}  {'class':<24}{'output':<20}{'parameters':>14}")
    for layer in table:
        shape = "-" if not layer.output else "×".join(map(str, layer.output[1:]))
        say(f"{layer.name:<{width}}  {layer.kind:<24}{shape:<20}{layer.parameters:>14,}")


def _described(
    name: str, size: tuple[int, int], summary: ModelSummary, published: bool
) -> dict[str, Any]:
    return {
        "model": name,
        "pixels": size_text(size),
        "parameters": summary.parameters,
        "GMACs": round(summary.macs / 1e9, 4),
        "weights": "published" if published else "none published",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv, reader_ends=True)


if __name__ == "__main__":
    sys.exit(main())
