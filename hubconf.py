"""Entry points of ``torch.hub``: every model that this project registers, and ``load``.

.. code-block:: python

    model = torch.hub.load(REPOSITORY_OR_FOLDER, "deit_tiny_patch16_224", pretrained=True)
    model = torch.hub.load(REPOSITORY_OR_FOLDER, "load", "output/pets/best.pth")
"""

from collections.abc import Callable as _Callable
from typing import Any as _Any

import timm
from timm.models import model_entrypoint as _model_entrypoint
from torch import nn

import inference
import models  # noqa: F401 (registers the models)

dependencies = ["torch", "torchvision", "timm", "numpy", "PIL", "yaml"]


def load(path: str, *, device: str = "cpu", ema: bool = False) -> nn.Module:
    """The trained model of a checkpoint, of an exported file, or a published one.

    It takes (B, C, H, W) normalised images to (B, K) logits and is in evaluation mode;
    ``inference.load_for_inference`` gives its class names and its transform too.

    Args:
        path: as of ``inference.load_for_inference``.
        device: where the model is to be.
        ema: take the moving average of the weights.

    Raises:
        CheckpointError: it can't be read or fetched.
    """
    return inference.load_for_inference(path, device=device, ema=ema).model


def _entry_point(name: str) -> _Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: _Any) -> nn.Module:
        return timm.create_model(name, pretrained=pretrained, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = (
        f"{name}, with the published weights if ``pretrained``; further arguments as of "
        "``timm.create_model``."
    )
    return build


for _name in timm.list_models():
    if not _model_entrypoint(_name).__module__.startswith("timm."):
        globals()[_name] = _entry_point(_name)
