"""Ways to make a training step that may be faster than the usual one: measured, not yet chosen."""

import contextlib
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from architectures.layers import PatchEmbed


@dataclass(frozen=True)
class Variant:
    """What differs from the usual way. On a CPU nothing is compiled: ``options`` don't count."""

    options: tuple[str, ...] = ()
    """Of the run, beside ``--compile``."""
    change: Callable[[nn.Module], None] = lambda model: None
    """Done to the model before it is compiled."""
    surroundings: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    """Around all steps."""


class PatchLinear(nn.Conv2d):
    """A convolution of patches that don't overlap, as one product of matrices.

    The same sums as ``nn.Conv2d`` with the kernel as stride, rounded in another order, and without
    the copies into the layout that the convolution wants.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H/P, W/P), as a view of (B, N, D)."""
        rows, columns = x.shape[2] // self.kernel_size[0], x.shape[3] // self.kernel_size[1]
        patches = x.unflatten(2, (rows, -1)).unflatten(4, (columns, -1))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, rows, columns, C·P·P)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def patches_as_linear(model: nn.Module) -> None:
    """Let the patch embeddings of ``model`` compute as ``PatchLinear``; weights and names stay."""
    for module in model.modules():
        if isinstance(module, PatchEmbed):
            module.proj.__class__ = PatchLinear


class InAutocastType(nn.Module):
    """What comes in, in the type that autocast computes in; without autocast as it is."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def residual_in_autocast_type(model: nn.Module) -> None:
    """Let the sums along the blocks of a transformer be of autocast's type in place of float32.

    Norms still compute in float32. What torch's compiler makes of a step of DeiT-S of 256 images
    then reads and writes 27.8 GB outside of matrix products and attention in place of 33.5 GB.
    """
    if isinstance(getattr(model, "pos_drop", None), nn.Module):
        model.pos_drop = nn.Sequential(model.pos_drop, InAutocastType())


def _cudnn_attention() -> contextlib.AbstractContextManager[None]:
    """cuDNN's attention where it takes the inputs, else what torch would take."""
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *others], set_priority=True)


def _fused_epilogues() -> contextlib.AbstractContextManager[None]:
    """Products of matrices from Triton where it is faster, with what follows them (GELU, the sum
    with the residual) in the same kernel."""
    return torch._inductor.config.patch(max_autotune_gemm=True)


def with_own_code(model: nn.Module) -> None:
    """Let ``model`` be compiled for itself: torch keeps compiled graphs by the code of ``forward``,
    and would run that of another model of the class, compiled under other settings."""
    kind = type(model)
    forward = kind.forward
    copied = types.FunctionType(
        forward.__code__.replace(),
        forward.__globals__,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    model.__class__ = type(kind.__name__, (kind,), {"forward": copied})


USUAL = Variant()
VARIANTS = {
    "half-residual": Variant(change=residual_in_autocast_type),
    "patch-linear": Variant(change=patches_as_linear),
    "cudnn-attention": Variant(surroundings=_cudnn_attention),
    "cuda-graphs": Variant(options=("--compile-mode", "reduce-overhead")),
    "fused-epilogues": Variant(surroundings=_fused_epilogues),
}
