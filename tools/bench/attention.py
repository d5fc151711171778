"""A training step of a CaiT beside timm's: time and memory.

Both models have the same weights and see the same images under the same autocast. Their steps
(forward, backward, AdamW) take turns, so that a busy machine slows both alike. The result is added
to benchmarks/attention-DEVICE.json.

Memory is, on CUDA, the most that was allocated during a step, with one model alone on the device;
on a CPU, the bytes that a forward pass keeps for the backward pass, parameters not counted.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args

import timm
import torch
import torch.nn.functional as F
from timm.models import cait as timm_cait
from torch import Tensor, nn

import cait_models
import models
import utils
from architectures.talking_heads import Choice, set_path
from errors import OptionError
from tools.bench.common import (
    bench_parser,
    figures_path,
    processor,
    synchronise,
    write_figures,
)
from tools.common import command

CLASSES = 1000
Step = Callable[[], None]


def build_pair(name: str) -> tuple[nn.Module, nn.Module, int]:
    """Our CaiT ``name``, timm's with the same weights, and the side of their images in pixels.

    Raises OptionError for a model that isn't a CaiT.
    """
    name = models.resolve_name(name)
    if name not in cait_models.TIMM_NAMES:
        raise OptionError("model", f"{name} is no CaiT: {', '.join(cait_models.TIMM_NAMES)}")
    size = timm.get_pretrained_cfg(cait_models.TIMM_NAMES[name]).input_size[-1]
    ours = models.build_model(name, CLASSES, input_size=size)
    theirs = getattr(timm_cait, cait_models.TIMM_NAMES[name])(num_classes=CLASSES)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, size


def loss_of(model: nn.Module, images: Tensor, targets: Tensor, amp: torch.dtype | None) -> Tensor:
    """Cross-entropy of one forward pass under autocast to ``amp`` (None: full precision)."""
    with torch.autocast(images.device.type, amp or torch.bfloat16, enabled=amp is not None):
        return F.cross_entropy(model(images), targets)


def training_step(
    model: nn.Module, images: Tensor, targets: Tensor, amp: torch.dtype | None
) -> Step:
    """A function that makes one step of training and waits until the device has done it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        loss_of(model, images, targets, amp).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronise(images.device)

    return step


def alternate(steps: dict[str, Step], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of ``rounds`` runs of each step, in turns, after ``warmup`` that don't count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in command.progress(range(-warmup, rounds), "steps"):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def bytes_kept(loss: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that computing ``loss`` keeps for its backward pass, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = loss()  # held, so that no storage is freed and its address used again
    del result
    return sum(kept.values())


def memory(model: nn.Module, images: Tensor, targets: Tensor, amp: torch.dtype | None) -> int:
    """Bytes of a step, as the module says; ``model`` is left as it was."""
    if images.device.type != "cuda":
        return bytes_kept(lambda: loss_of(model, images, targets, amp), model)
    alone = copy.deepcopy(model).to(images.device)
    step = training_step(alone, images, targets, amp)
    step()  # the optimiser's state is there from now on
    torch.cuda.reset_peak_memory_stats(images.device)
    step()
    peak = torch.cuda.max_memory_allocated(images.device)
    del alone, step
    torch.cuda.empty_cache()
    return peak


def hardware(device: torch.device) -> str:
    """The name of the GPU, or of the CPU with the threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Everything that is written to the file."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    utils.seed_all(0)
    set_path(arguments.talking_heads)
    amp = utils.amp_dtype(arguments.amp, device)
    batch = arguments.batch_size or (128 if device.type == "cuda" else 4)
    ours, theirs, size = build_pair(arguments.model)
    images = torch.randn(batch, 3, size, size, device=device)
    targets = torch.randint(CLASSES, (batch,), device=device)
    pair = {"ours": ours, "timm": theirs}
    used = {name: memory(model, images, targets, amp) for name, model in pair.items()}
    steps = {}
    for name, model in pair.items():
        model = model.to(device)
        model = torch.compile(model) if arguments.compile else model
        steps[name] = training_step(model, images, targets, amp)
    seconds = alternate(steps, arguments.steps)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "model": models.resolve_name(arguments.model),
        "batch_size": batch,
        "amp": str(amp).removeprefix("torch."),
        "compile": arguments.compile,
        "talking_heads": arguments.talking_heads,
        "hardware": hardware(device),
        "load_average": os.getloadavg()[0],
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "memory": "peak allocated" if device.type == "cuda" else "kept for the backward pass",
        "step_seconds": medians,
        "fastest_and_slowest_seconds": {n: [min(t), max(t)] for n, t in seconds.items()},
        "bytes": used,
        "times_faster": medians["timm"] / medians["ours"],
        "share_of_timms_memory": used["ours"] / used["timm"],
    }


def _carry_out(arguments: argparse.Namespace) -> None:
    device = utils.pick_device(arguments.device)
    result = measure(arguments, device)
    print(f"{result['model']}, batch {result['batch_size']}, {result['hardware']}")
    for name, seconds in result["step_seconds"].items():
        mebibytes = result["bytes"][name] / 2**20
        print(f"{name}: {1e3 * seconds:.1f} ms, {mebibytes:.0f} MiB {result['memory']}")
    print(
        f"{result['times_faster']:.2f} times as fast, "
        f"{100 * result['share_of_timms_memory']:.0f} % of the memory"
    )
    path = figures_path("attention", device, arguments.out)
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    write_figures(path, [*results, result])
    print(f"added to {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = bench_parser("attention", __doc__)
    parser.add_argument("--model", default="cait_s24_224", help="a CaiT (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="default: 128 on CUDA, 4 on a CPU")
    parser.add_argument("--steps", type=int, default=10, help="of each model (default: 10)")
    parser.add_argument("--threads", type=int, help="of a CPU (default: PyTorch's)")
    parser.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"])
    parser.add_argument("--compile", action="store_true", help="torch.compile both models")
    parser.add_argument(
        "--talking-heads", default="auto", choices=get_args(Choice), help="ours only"
    )
    return command.run(_carry_out, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
