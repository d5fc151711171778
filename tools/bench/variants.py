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
    "patch-linear": Variant(change=patches_as_linear),
    "cudnn-attention": Variant(surroundings=_cudnn_attention),
    "cuda-graphs": Variant(options=("--compile-mode", "reduce-overhead")),
    "fused-epilogues": Variant(surroundings=_fused_epilogues),
}
