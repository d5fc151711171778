"""Models small enough for every test."""

import timm
import torch
from torch import nn


def tiny_vit(distilled: bool = False) -> nn.Module:
    """DeiT for images of 32 × 32 pixels and five classes: 4 patches, 3 blocks, 12 channels."""
    name = "deit_tiny_distilled_patch16_224" if distilled else "vit_tiny_patch16_224"
    return timm.create_model(name, img_size=32, depth=3, embed_dim=12, num_heads=2, num_classes=5)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Values that make every parameter matter (a LayerScale of 1e-5 would hide whole blocks)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
