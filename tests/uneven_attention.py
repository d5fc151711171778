"""Small transformers whose attention is uneven, and that attention computed by hand."""

import numpy as np
import torch
from torch import nn

import models
from cait_models import CaiT
from inference import Classifier

SIDE = 16


def classifier(model: nn.Module) -> Classifier:
    return Classifier(model.eval(), lambda image: image, ["a", "b", "c"])


def deit(kind=models.VisionTransformer, depth=3) -> nn.Module:
    model = kind(
        img_size=SIDE, patch_size=4, num_classes=3, embed_dim=16, depth=depth, num_heads=2
    ).eval()
    # As initialised attention is all but even.
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.5)
    return model


def cait() -> nn.Module:
    model = CaiT(img_size=SIDE, patch_size=4, num_classes=3, embed_dim=16, depth=1, num_heads=2)
    for block in model.blocks_token_only:
        for linear in (block.attn.q, block.attn.k):
            nn.init.normal_(linear.weight, std=0.5)
        nn.init.ones_(block.gamma_1)
    return model.eval()


def attention_by_hand(layer: nn.Module, x: np.ndarray) -> np.ndarray:
    """(N, D) to (heads, N, N), head by head; what it makes of the values is the layer's output."""
    dim = x.shape[1]
    width = dim // layer.num_heads
    weight, bias = layer.qkv.weight.detach().numpy(), layer.qkv.bias.detach().numpy()
    q, k, v = (
        x @ weight[i * dim : (i + 1) * dim].T + bias[i * dim : (i + 1) * dim] for i in range(3)
    )
    maps, outputs = [], []
    for head in range(layer.num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(width))
        maps.append(scores / scores.sum(1, keepdims=True))
        outputs.append(maps[-1] @ v[:, part])
    mixed = np.concatenate(outputs, 1) @ layer.proj.weight.detach().numpy().T
    mixed = mixed + layer.proj.bias.detach().numpy()
    shown = layer(torch.from_numpy(x)[None])[0].detach().numpy()
    np.testing.assert_allclose(mixed, shown, atol=1e-4)
    return np.stack(maps)


@torch.no_grad()
def layers_by_hand(model: nn.Module, image: torch.Tensor) -> list[np.ndarray]:
    x = model.patch_embed(image[None])
    x = torch.cat((model.prefix_tokens(), x), 1) + model.pos_embed
    maps = []
    for block in model.blocks:
        maps.append(attention_by_hand(block.attn, block.norm1(x)[0].numpy()))
        x = block(x)
    return maps
