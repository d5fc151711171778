"""A model's task in timm's hub form: notes of its ``pretrained_cfg``, which has no field for it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from checkpointing.files import CLASSIFICATION, MULTILABEL

_TASK, _THRESHOLDS = "task: ", "thresholds: "


def task_notes(task: str, thresholds: Sequence[float] | None) -> list[str]:
    """The notes of a model of this ``--task``; none of the usual one."""
    if task == CLASSIFICATION:
        return []
    found = [] if thresholds is None else [_THRESHOLDS + json.dumps(list(thresholds))]
    return [_TASK + task, *found]


def noted_task(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds besides for what the notes say: nothing, or the ``task`` of its
    config and ``thresholds``. Raises ValueError for notes that can't be read."""
    notes = [note for note in cfg.get("notes") or () if isinstance(note, str)]
    if _TASK + MULTILABEL not in notes:
        return {}
    found: dict[str, Any] = {"task": MULTILABEL}
    for note in notes:
        if note.startswith(_THRESHOLDS):
            found["thresholds"] = json.loads(note.removeprefix(_THRESHOLDS))
    return found
