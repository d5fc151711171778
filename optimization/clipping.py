"""Gradient clipping."""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from distributed.wrapping import local, whole


def clip_gradients(
    parameters: Iterable[nn.Parameter],
    clip_grad: float | None,
    mode: str = "norm",
    *,
    spared: Collection[nn.Parameter] = (),
) -> Tensor:
    """Limit the gradients in place, without waiting for the device.

    Args:
        parameters: those without a gradient are passed over.
        clip_grad: the limit; None leaves the gradients alone.
        mode: norm (of all gradients together), value (each element), or agc (adaptive gradient
            clipping, each unit against its weight: Brock et al. 2021, eq. 3).
        spared: parameters that agc leaves alone; the paper spares the classifier.

    Returns:
        Norm of all gradients before clipping, a scalar on their device.
    """
    parameters = [p for p in parameters if p.grad is not None]
    if not parameters:
        return torch.zeros(())
    if clip_grad is not None and mode == "norm":
        return whole(nn.utils.clip_grad_norm_(parameters, clip_grad))
    norm = whole(nn.utils.get_total_norm([p.grad for p in parameters]))
    if clip_grad is not None and mode == "value":
        for parameter in parameters:
            local(parameter.grad).clamp_(-clip_grad, clip_grad)
    elif clip_grad is not None:
        from timm.utils.agc import adaptive_clip_grad

        left_out = {id(p) for p in spared}
        adaptive_clip_grad([p for p in parameters if id(p) not in left_out], clip_grad)
    return norm
