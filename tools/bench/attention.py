"""A training step of a CaiT beside timm's: time and memory.

Both models have the same weights and see the same images under the same autocast. Their steps
(forward, backward, AdamW) take turns, so that a busy machine slows both alike. On CUDA a second row
compares both compiled.

Memory is, on CUDA, the most that was allocated during a step, with one model alone on the device;
on a CPU, the bytes that a forward pass keeps for the backward pass, parameters not counted. The
limit is what takes longer at the rates measured in this run: the products of matrices, or writing
once and reading once what is kept for the backward pass.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import get_args

import timm
import torch
import torch.nn.functional as F
from timm.models import cait as timm_cait
from torch import Tensor, nn

import cait_models
import models
import utils
from architectures.summary import summarise
from architectures.talking_heads import Choice, set_path
from errors import OptionError
from tools.bench.common import (
    Row,
    Rows,
    add_repeats,
    bench_parser,
    compare,
    limit,
    run,
    surviving,
    synchronise,
)
from tools.bench.limits import copy_rate, launch_seconds, matmul_limit, matmul_rate, seconds_of
from tools.common import command

CLASSES = 1000
TURN = 0.6  # seconds
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
    """A function that makes one step of training, without waiting for the device."""
    cuda = images.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=cuda)

    def step() -> None:
        loss_of(model, images, targets, amp).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


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


def measure(arguments: argparse.Namespace, device: torch.device) -> Rows:
    """The benchmark's rows."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    set_path(arguments.talking_heads)
    amp = utils.amp_dtype(arguments.amp, device)
    small = 512 if arguments.toy else None
    rates = matmul_rate(device, amp or torch.float32, small), copy_rate(device, small)
    batch = arguments.batch_size or (128 if device.type == "cuda" else 4)
    if arguments.toy:
        arguments.models, batch = arguments.models[-1:], 1
    parts: list[tuple[str, Callable[[], Rows]]] = []
    for name in arguments.models:
        parts.append((name, partial(_rows_of, name, batch, amp, rates, device, arguments.repeats)))
    yield from surviving(parts)


def _rows_of(
    name: str,
    batch: int,
    amp: torch.dtype | None,
    rates: tuple[float, float],
    device: torch.device,
    repeats: int,
) -> Rows:
    """Both as they are, and on CUDA both compiled."""
    utils.seed_all(0)
    ours, theirs, size = build_pair(name)
    images = torch.randn(batch, 3, size, size, device=device)
    targets = torch.randint(CLASSES, (batch,), device=device)
    precision = str(amp or torch.float32).removeprefix("torch.")
    title = f"{models.resolve_name(name)}, batch {batch}, {precision}"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        title += f", {threads} thread{'s' * (threads > 1)}"
    sides = {"ours": ours, "theirs": theirs}
    used = {side: memory(model, images, targets, amp) for side, model in sides.items()}
    macs = summarise(ours, size).macs
    kept = bytes_kept(lambda: loss_of(ours.to(device), images, targets, amp), ours)
    for how in ("", ", compiled") if device.type == "cuda" else ("",):
        steps = {}
        for side, model in sides.items():
            model = model.to(device)
            model = torch.compile(model) if how else model
            steps[side] = training_step(model, images, targets, amp)
        row = _compare(title + how, steps, batch, device, repeats)
        row |= _memory(used, device) if not how else {}
        row["limit"] = _limit(rates, amp, macs, kept / batch, row["ours"])
        yield row


def _compare(
    title: str, steps: dict[str, Step], batch: int, device: torch.device, repeats: int
) -> Row:
    """Turns of ``TURN`` seconds on CUDA, of one step on a CPU."""
    counts = dict.fromkeys(steps, 1)
    if device.type == "cuda":
        for side, step in steps.items():
            counts[side] = max(5, round(TURN / seconds_of(step, device, count=3)))

    def turn(side: str) -> int:
        for _ in range(counts[side]):
            steps[side]()
        synchronise(device)
        return counts[side] * batch

    row = compare(title, lambda: turn("ours"), lambda: turn("theirs"), repeats)
    if device.type != "cuda":
        return row
    row["step_ms"] = {side: 1e3 * batch / row[side] for side in steps}
    row["host_ms"] = {side: 1e3 * launch_seconds(step, device) for side, step in steps.items()}
    for side in steps:
        print(f"   {side}: step {row['step_ms'][side]:.1f} ms, host {row['host_ms'][side]:.1f} ms")
    return row


def _memory(used: dict[str, int], device: torch.device) -> Row:
    share = used["ours"] / used["theirs"]
    kind = "peak allocated" if device.type == "cuda" else "kept for the backward pass"
    print(f"   {share:.0%} of its memory ({kind})")
    return {"bytes": used, "share_of_memory": share, "note": f"{share:.0%} of its memory ({kind})"}


def _limit(
    rates: tuple[float, float], amp: torch.dtype | None, macs: int, kept: float, ours: float
) -> Row:
    """Whatever takes longer; ``kept``: bytes per image."""
    by_products, by_copies = rates[0] / (6 * macs), rates[1] / (2 * kept)
    if by_products < by_copies:
        return matmul_limit(amp or torch.float32, rates[0], macs, ours)
    return limit("what is kept, written and read once", by_copies)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = bench_parser("attention", __doc__)
    default = ["cait_s24_224", "cait_xxs24_224"]
    parser.add_argument("--models", nargs="+", default=default, help="CaiTs (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=command.positive, help="default: 128 on CUDA, 4 on a CPU"
    )
    parser.add_argument("--threads", type=command.positive, help="of a CPU (default: PyTorch's)")
    parser.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"])
    parser.add_argument(
        "--talking-heads", default="auto", choices=get_args(Choice), help="ours only"
    )
    add_repeats(parser, default=5)
    return run("attention", measure, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
