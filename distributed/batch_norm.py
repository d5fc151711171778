"""Batch norm over the images of all processes."""

import torch
import torch.distributed.nn.functional
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` with batch norms whose statistics are those of all processes' images together.

    Names and values of weights stay. On CUDA it is torch's own module, which has no form for the
    CPU; there the sums are exchanged by a differentiable all-reduce.
    """
    if device.type == "cuda":
        return convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.forward = _SyncedForward(module)
    return model


class _SyncedForward:
    """The forward pass of a batch norm with the statistics of all processes."""

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.norm
        if norm.training:
            y = _normalise(norm, x)
        else:
            y = F.batch_norm(
                x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
            )
        return norm.act(norm.drop(y)) if isinstance(norm, BatchNormAct2d) else y


def _normalise(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Training mode; ``x`` is (B, C, …), and B may differ between processes."""
    dims = [0, *range(2, x.ndim)]
    shape = [1, -1] + [1] * (x.ndim - 2)
    values = x.float()
    count = float(x.numel() // x.shape[1])
    # In float64 the sums of squares of all processes lose nothing of the variance.
    part = [moment.double() for moment in torch.var_mean(values, dims, correction=0)]
    moments = torch.stack([part[1], part[0] + part[1].square(), torch.ones_like(part[0])])
    moments = torch.distributed.nn.functional.all_reduce(moments * count)  # (3, C)
    total = moments[2]
    mean, square = moments[0] / total, moments[1] / total
    variance = (square - mean.square()).float()  # (C,)
    mean = mean.float()
    if norm.track_running_stats:
        with torch.no_grad():
            norm.num_batches_tracked += 1
            momentum = norm.momentum
            if momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked)
            norm.running_mean.lerp_(mean, momentum)
            norm.running_var.lerp_(variance * (total / (total - 1)).float(), momentum)
    y = (values - mean.view(shape)) * torch.rsqrt(variance + norm.eps).view(shape)
    if norm.affine:
        y = y * norm.weight.view(shape) + norm.bias.view(shape)
    return y.to(x.dtype)
