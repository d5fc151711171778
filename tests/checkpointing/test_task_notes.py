"""checkpointing/task_notes.py: task and thresholds among the notes of timm's hub form."""

import pytest

from checkpointing.task_notes import noted_task, task_notes


@pytest.mark.parametrize("thresholds", [None, [0.25, 0.1 + 0.2]])
def test_what_is_noted_is_read_back_to_the_last_digit(thresholds):
    notes = ["somebody's own", *task_notes("multilabel", thresholds), 7]
    expected = {"task": "multilabel"} | ({"thresholds": thresholds} if thresholds else {})
    assert noted_task({"notes": notes}) == expected


@pytest.mark.parametrize("cfg", [{}, {"notes": None}, {"notes": ["thresholds: [0.5]"]}])
def test_a_model_of_one_class_per_image_needs_no_notes(cfg):
    assert task_notes("classification", [0.5]) == []
    assert noted_task(cfg) == {}


def test_thresholds_that_are_no_json_are_refused():
    with pytest.raises(ValueError):
        noted_task({"notes": ["task: multilabel", "thresholds: [0.5"]})
