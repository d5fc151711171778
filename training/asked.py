"""What a user asked for, as opposed to what only a checkpoint names."""

import contextlib

from architectures.hub import HUB, unasked
from architectures.library_model import TRANSFORMERS
from checkpointing.published import is_published
from config import CHECKPOINT, Config


def asked_only(config: Config) -> contextlib.AbstractContextManager[None]:
    """Inside, the hub isn't asked for a model or teacher that only ``--resume``'s file names."""
    names = {"model": config.model.model, "teacher_path": config.loss.teacher_path}
    found = [
        name
        for option, name in names.items()
        if name.startswith((HUB, TRANSFORMERS)) and config.origin[option] == CHECKPOINT
    ]
    if is_published(config.run.resume):  # whose name is the model's
        found = []
    return unasked(found)
