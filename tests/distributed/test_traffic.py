"""Bytes that a step exchanges, on process groups of one process that pretend to be of many."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from tiny_epochs import in_batches, make_state
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine
from distributed.wrapping import no_sync, replicate, shard
from losses import CrossEntropy

CPU = torch.device("cpu")
DOCS = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")


@pytest.fixture
def world(request) -> Iterator[int]:
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


class Traffic(TorchDispatchMode):
    """Bytes of the largest tensor of each exchange, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        if operation.namespace in ("c10d", "_c10d_functional"):
            kind = operation.overloadpacket.__name__.strip("_")
            tensors = [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]
            self.bytes[kind] += max(x.numel() * x.element_size() for x in tensors)
            self.calls[kind] += 1
        return operation(*arguments, **(keywords or {}))


def deit(name: str = "small", **values: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(f"deit_{name}_patch16_224", **values)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters()) * 4


EVERY = pytest.mark.parametrize("world", [8, 64, 512], indirect=True)


@EVERY
def test_ddp_exchanges_each_gradient_once(world):
    """float32 whatever autocast does, and nothing before the last batch of an update."""
    model = deit(depth=2, img_size=32)
    net = replicate(model, CPU)
    sent = []

    def note(_state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    net.register_comm_hook(None, note)
    with torch.autocast("cpu", torch.bfloat16):
        with no_sync(net):
            net(torch.randn(1, 3, 32, 32)).sum().backward()
        assert not sent
        net(torch.randn(1, 3, 32, 32)).sum().backward()
    assert sum(sent) == size(model)


def padded(module: nn.Module, world: int) -> int:
    """Values of all shards together: each process has as many rows of a parameter."""
    return sum(
        math.ceil(p.shape[0] / world) * world * math.prod(p.shape[1:]) for p in module.parameters()
    )


def sharded_traffic(model: nn.Module, world: int, size: int) -> tuple[int, int]:
    """Bytes gathered, of ``size`` each, and bytes of gradients, which are float32.

    Blocks are gathered for the forward and again for the backward pass, the rest once.
    """
    whole, blocks = padded(model, world), padded(model.blocks, world)
    return (whole + blocks) * size, whole * 4


@pytest.mark.parametrize(
    "world, amp",
    [(8, None), (8, torch.bfloat16), (64, torch.bfloat16), (512, torch.bfloat16)],
    indirect=["world"],
)
def test_fsdp_gathers_blocks_twice_and_scatters_gradients_once(world, amp):
    model = deit(depth=2, num_classes=100)
    gathered, scattered = sharded_traffic(model, world, 2 if amp else 4)
    whole = {name: p.shape for name, p in model.named_parameters()}
    shard(model, CPU, amp)
    for name, parameter in model.named_parameters():
        rows = math.ceil(whole[name][0] / world)
        assert parameter.to_local().shape == (rows, *whole[name][1:]), name
    with Traffic() as traffic, torch.autocast("cpu", amp, enabled=amp is not None):
        model(torch.randn(1, 3, 224, 224)).sum().backward()
    assert traffic.bytes == {"allgather_base": gathered, "reduce_scatter_base": scattered}
    # Two blocks, and what lies around them.
    assert traffic.calls == {"allgather_base": 5, "reduce_scatter_base": 3}
    for parameter in model.parameters():
        assert parameter.grad.to_local().shape == parameter.to_local().shape


@pytest.mark.parametrize("world", [8], indirect=True)
def test_an_update_exchanges_a_flag_beside_the_gradients(world):
    """And what the engine reads at the end."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    state = make_state(model)
    batches = in_batches(torch.randn(20, 3, 2, 2), torch.zeros(20, dtype=torch.int64), 4)
    settings = engine.StepSettings(CPU, batch_size=4, clip_grad=1.0, log_interval=1000)
    state.progress.update = 1
    with Traffic() as traffic:
        engine.train_one_epoch(state, CrossEntropy(), batches, settings, steps=100)
    assert traffic.calls == {"allreduce": 5 + 1}
    assert traffic.bytes == {"allreduce": 5 * 4 + 5 * 8}


def table(title: str) -> dict[str, list[str]]:
    """Rows of the table of docs/cluster.md below ``title``, by their first cell."""
    lines = DOCS.partition(f"**{title}.**")[2].split("\n\n**")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| DeiT")]
    return {cells[0]: cells[1:] for cells in rows}


@pytest.mark.parametrize("name", ["small", "base"])
def test_docs_state_these_bytes(name):
    with torch.device("meta"):
        model = deit(name)
    row = f"DeiT-{name[0].upper()}"
    megabytes = size(model) / 1e6
    assert table("Gradient traffic")[row][:2] == [
        f"{megabytes:.0f} MB ({megabytes / 2:.0f})",
        f"{2 * round(megabytes):.0f} MB",
    ]
    for amp, wide in (("bf16", 2), ("float32", 4)):
        for world, cell in zip((8, 64, 512), table("Sharded")[f"{row}, {amp}"], strict=True):
            gathered, scattered = sharded_traffic(model, world, wide)
            assert cell == f"{gathered / 1e6:.0f} + {scattered / 1e6:.0f} MB"
