"""A model on several processes: DDP and FSDP2."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.modules.batchnorm import _BatchNorm


def replicate(model: nn.Module, device: torch.device, *, static: bool = False) -> nn.Module:
    """``model`` inside DDP: whole on every process, gradients averaged.

    ``static``: every step uses the same parameters and exchanges gradients, so that DDP needn't
    find that out at each step. Not possible where gradients are accumulated.
    """
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        model, ids, gradient_as_bucket_view=True, static_graph=static
    )


def shard(model: nn.Module, device: torch.device, amp: torch.dtype | None) -> None:
    """Spread the parameters of ``model`` over all processes, in place (FSDP2).

    Each block is gathered for its forward and backward pass and let go again. With ``amp`` weights
    travel and are used in that type; gradients are summed in float32. A model may lie in host
    memory before: its blocks move to ``device`` one by one.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Batch norm mixes its weights with statistics, which are float32.
    mixed = amp is not None and not any(isinstance(m, _BatchNorm) for m in model.modules())
    policy = MixedPrecisionPolicy(
        param_dtype=amp if mixed else None,
        reduce_dtype=torch.float32,
        # Autocast decides what is computed in which type, as without sharding.
        cast_forward_inputs=False,
    )
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the model's lists and sequences: transformer blocks, residual blocks."""
    containers = [
        m for m in (model, *model.children()) if isinstance(m, nn.ModuleList | nn.Sequential)
    ]
    members = [m for container in containers for m in container.children()]
    return [m for m in members if m not in containers and any(True for _ in m.parameters())]


@contextlib.contextmanager
def no_sync(net: nn.Module) -> Iterator[None]:
    """Leave gradients on their process: more batches of the same update are to come."""
    if isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            net.set_requires_gradient_sync(True)
    else:
        with net.no_sync() if hasattr(net, "no_sync") else contextlib.nullcontext():
            yield


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass of ``model`` needs all processes."""
    return isinstance(model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """This process's part of ``tensor``, sharing its memory; all of it unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``; to be called by all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_on_main(weights: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """All of ``weights`` in the main process's host memory; to be called by all processes."""
    if weights is None:
        return None
    gathered = {}
    for name, tensor in weights.items():
        full = whole(tensor)
        # One tensor at a time, so that no device holds the whole model.
        gathered[name] = full.to("cpu", copy=True) if dist.get_rank() == 0 else torch.empty(0)
    return gathered


def like(value: Any, target: Tensor) -> Any:
    """``value`` laid out over the processes as ``target`` is, if it is a tensor of that shape."""
    if not isinstance(target, DTensor) or not isinstance(value, Tensor):
        return value
    if value.shape != target.shape:
        return value
    part = local(value)
    if not isinstance(value, DTensor):
        mesh = target.device_mesh
        chunks = part.chunk(mesh.size(), 0)
        rank = mesh.get_local_rank()
        part = chunks[rank] if rank < len(chunks) else part[:0]
    return DTensor.from_local(
        part.to(target.device).contiguous(),
        target.device_mesh,
        target.placements,
        run_check=False,
        shape=target.shape,
        stride=target.stride(),
    )


def flag_like(flag: Tensor, model_parameter: Tensor) -> Tensor:
    """``flag``, the same on all processes, in the form that an optimiser of such tensors takes."""
    if not isinstance(model_parameter, DTensor):
        return flag
    return DTensor.from_local(flag, model_parameter.device_mesh, [Replicate()], run_check=False)
