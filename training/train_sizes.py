"""Training at other sizes than that of evaluation, one after the other (``--train-sizes``).

Weights stay those of the full size: models interpolate their position embeddings in the forward
pass. The size follows from the epoch alone, so that a run may go on anywhere.
"""

import dataclasses
import logging

from torch import nn

from architectures.sizes import size_text
from architectures.summary import ModelSummary, summarise
from config import Config, stages, train_size
from errors import OptionError
from training.build import Parts
from training.data import with_train_size

log = logging.getLogger(__name__)

Size = tuple[int, int]


def summaries(model: nn.Module, config: Config, num_classes: int) -> dict[Size, ModelSummary]:
    """What ``model`` takes for an image of each size that it is to see, the full one first.

    Raises OptionError for a size that it can't see, or that is larger than that of evaluation.
    """
    full = config.model.size
    channels = config.model.in_chans
    found = {full: summarise(model, full, num_classes, in_chans=channels)}
    for stage in stages(config.model.train_sizes):
        if stage.size in found:
            continue
        words = size_text(stage.size)
        if stage.size[0] > full[0] or stage.size[1] > full[1]:
            raise OptionError(
                "train_sizes",
                f"{words} is larger than the {size_text(full)} of evaluation: raise --input-size",
            )
        try:
            found[stage.size] = summarise(model, stage.size, num_classes, in_chans=channels)
        except OptionError as error:
            raise OptionError(
                "train_sizes", f"{error.message}: take sizes that do, or leave it out"
            ) from None
    return found


def at_epoch(parts: Parts, epoch: int) -> Parts:
    """``parts`` with the images and loaders of ``epoch``; the same where nothing changes."""
    size = train_size(parts.config.model, epoch)
    if size == parts.data.train_size:
        return parts
    log.info("size     training images of %s from here on", size_text(size))
    data = with_train_size(
        parts.data, parts.config, parts.preprocessing, size, parts.device, parts.processes.is_main
    )
    settings = dataclasses.replace(
        parts.settings, prepare=data.prepare, macs=round(parts.settings.macs * _ratio(parts, size))
    )
    return dataclasses.replace(parts, data=data, settings=settings)


def _ratio(parts: Parts, size: Size) -> float:
    """Work for an image of ``size`` over that for one of the size that is trained at now."""
    return parts.summaries[size].macs / parts.summaries[parts.data.train_size].macs


def relative_cost(parts: Parts, epoch: int) -> float:
    """Work for a training image of ``epoch`` over that for one of evaluation's size."""
    if not parts.config.model.train_sizes:
        return 1.0
    return parts.summaries[train_size(parts.config.model, epoch)].macs / parts.summary.macs
