"""The one way in for trained models: evaluation, prediction, export and serving all start here."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

import checkpoint
import models
from augment import Preprocessing
from config import AugmentOptions
from datasets import build_transform
from errors import CheckpointError


class Classifier(NamedTuple):
    """A trained model and what is needed to ask it."""

    model: nn.Module
    """(B, 3, H, W) normalised pictures to (B, C) logits; in evaluation mode."""
    transform: Callable[[Image.Image], Tensor]
    """An RGB picture to (3, H, W), as in the evaluation of training."""
    class_names: list[str]
    """C names."""


def load_for_inference(
    path: str | Path, *, device: torch.device | str = "cpu", ema: bool = False
) -> Classifier:
    """The model of a checkpoint that this project wrote, ready to answer.

    Args:
        path: file or https URL.
        device: where the model is to be.
        ema: take the moving average of the weights.

    Raises:
        CheckpointError: the file can't be read, or holds weights alone, or no average.
    """
    try:
        return from_content(checkpoint.load_file(path), device=device, ema=ema)
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from None


def from_content(
    content: Mapping[str, Any],
    *,
    device: torch.device | str = "cpu",
    ema: bool = False,
    preprocessing: Preprocessing | None = None,
) -> Classifier:
    """As :func:`load_for_inference`, from a checkpoint already in memory.

    Another ``preprocessing`` than the checkpoint's may ask for another input size: position
    embeddings are then interpolated.
    """
    missing = [k for k in ("config", "class_names", "preprocessing") if k not in content]
    if missing:
        raise CheckpointError(
            f"the checkpoint holds no {', '.join(missing)}, it is not a training checkpoint of "
            "this project: take its weights over with --finetune"
        )
    options, class_names = content["config"], list(content["class_names"])
    trained = Preprocessing.from_dict(content["preprocessing"])
    preprocessing = preprocessing or trained
    model = models.build_model(
        options["model"], len(class_names), input_size=preprocessing.input_size
    )
    weights = checkpoint.weights_of(content, ema=ema)
    if preprocessing.input_size != trained.input_size:
        models.load_pretrained_weights(model, weights)
        weights = model.state_dict()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise CheckpointError(
            f"the weights don't fit the model {options['model']}: {reason}"
        ) from None
    model.to(device).eval()
    return Classifier(model, build_transform(False, preprocessing, AugmentOptions()), class_names)
