"""Thresholds of a multi-label model that has none, or none of its own."""

import torch

from optimization.multilabel import MultiLabelCounts
from pipeline.loader import Loader
from tools.common import command
from tools.common.trained import Trained


@torch.no_grad()
def best_thresholds(model: Trained, loader: Loader) -> list[float]:
    """Of each class the probability with the greatest F1 on the images of ``loader``, as training
    chooses it; 0.5 where no image has it."""
    counts = MultiLabelCounts(len(model.classifier.class_names), model.device)
    for batch in command.progress(loader, "batches", total=len(loader)):
        if len(batch.targets):
            logits = model.classifier.model(batch.images.to(model.device)).float()
            counts.add(logits, batch.targets.to(model.device))
    return counts.result().thresholds.tolist()
