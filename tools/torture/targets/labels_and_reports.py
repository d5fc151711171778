"""Small files: labels, lists of images, logs, reports, spaces of a search."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

from loggers import read_log
from tools.common.trained import find_images
from tools.serve.drift import Reference
from tools.torture.targets import Target
from tools.torture.targets.mutation import (
    changed,
    mutated,
    mutated_file,
    mutated_text,
    odd_text,
    odd_value,
)
from tools.tune.space import grid_points, read_space
from training.label_files import read_class_map, read_real_labels, read_valid_labels
from training.label_space import ModelClasses

_CLASSES = ["cat", "dog", "n01440764 tench", "é", "3"]


def _text_or_json(rng: random.Random, texts: list[str], values: list[Any]) -> bytes:
    """A text of lines that goes wrong, or JSON that does."""
    chance = rng.random()
    if chance < 0.15:
        return mutated(rng, [text.encode() for text in texts])
    if chance < 0.5:
        return mutated_text(rng, texts).encode("utf-8", "surrogatepass")
    if chance < 0.6:
        return mutated_text(rng, [json.dumps(value) for value in values]).encode("utf-8", "replace")
    return json.dumps(changed(rng, rng.choice(values))).encode()


# --- labels ---------------------------------------------------------------------------------------

_LINES = ["cat 0\ndog 1\nfish 2\n", "cat\ndog\né\n", "0\n1\n4\n", "a b c  3\n\ufeffx\t1\r\n"]
_LABELS = [{"cat": 0, "dog": "dog"}, ["cat", "dog"], [[0, 1], [], [4]], [[1]] * 8]
_READERS = {
    "class_map.txt": read_class_map,
    "class_map.json": read_class_map,
    "valid_labels.txt": read_valid_labels,
}


def _labels(rng: random.Random) -> tuple[str, bytes]:
    name = rng.choice((*_READERS, "real.json"))
    return name, _text_or_json(rng, _LINES, _LABELS)


def _read_labels(given: tuple[str, bytes], folder: Path) -> None:
    name, content = given
    path = folder / name
    path.write_bytes(content)
    if name == "real.json":
        found = read_real_labels(str(path), 5)
        assert all(0 <= label < 5 for labels in found for label in labels)
        return
    found = _READERS[name](str(path), ModelClasses("resume", "x", len(_CLASSES), _CLASSES).find)
    indices = found.values() if isinstance(found, dict) else found
    assert all(0 <= index < 5 for index in indices)


# --- lists of images ------------------------------------------------------------------------------

_LISTS = ["path,label\na.png,1\nb.png,2\n", "a.png\nb.png\n", '"x, y.png"\n\n', "id,image\n1,é.jpg"]


def _list(rng: random.Random) -> bytes:
    return mutated_file(rng, _LISTS, 0.3)


def _read_list(content: bytes, folder: Path) -> None:
    (folder / "list.csv").write_bytes(content)
    assert find_images([str(folder / "list.csv")])


# --- logs, reports, spaces ------------------------------------------------------------------------

_RECORD = {"epoch": 1, "train_loss": 2.5, "val_top1": 40.0, "lr": 1e-3, "per_class": [1, 2]}
_LOG = "".join(json.dumps({**_RECORD, "epoch": epoch}) + "\n" for epoch in range(1, 4))
_REPORT = {
    "per_class": [{"class": "cat", "predicted": 5}, {"class": "dog", "predicted": 3}],
    "calibration": {"bins": {"count": [0, 1, 2, 5]}},
}
_SPACES = [
    "lr: {low: 1e-4, high: 1e-2, log: true}\nopt: [adamw, sgd]\n",
    "epochs:\n  low: 1\n  high: 9\n  step: 2\nmixup: {choices: [0, 0.8]}\n",
    "weight_decay: {low: 0, high: 0.1, step: 0.05}\nscale: [[0.1, 1], [0.3, 1]]\n",
]


def _log(rng: random.Random) -> bytes:
    return _text_or_json(rng, [_LOG], [_RECORD])


def _read_log(content: bytes, folder: Path) -> None:
    (folder / "log.txt").write_bytes(content)
    assert all(isinstance(record["epoch"], int) for record in read_log(folder / "log.txt"))


def _report(rng: random.Random) -> bytes:
    return _text_or_json(rng, [json.dumps(_REPORT)], [_REPORT])


def _read_report(content: bytes, folder: Path) -> None:
    (folder / "report.json").write_bytes(content)
    found = Reference.read(folder / "report.json", ["cat", "dog"])
    assert found.classes.shape == (2,) and (found.classes >= 0).all()
    assert len(found.confidences) and (found.confidences >= 0).all()


def _space(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return mutated_text(rng, _SPACES).encode("utf-8", "surrogatepass")
    values = {"low": 0, "high": 1, rng.choice(("step", "log", "choices")): odd_value(rng, 1)}
    value = changed(rng, values) if rng.random() < 0.7 else odd_text(rng)
    return f"{rng.choice(('lr', 'epochs', 'opt', 'mixup'))}: {value}".encode("utf-8", "replace")


def _read_space(content: bytes, folder: Path) -> None:
    (folder / "space.yaml").write_bytes(content)
    points = grid_points(read_space(folder / "space.yaml"))
    assert all(itertools.islice(points, 9))


TARGETS = (
    Target("files of labels", _labels, _read_labels),
    Target("lists of images", _list, _read_list, share=0.5),
    Target("log.txt", _log, _read_log, share=0.5),
    Target("report.json", _report, _read_report, share=0.5),
    Target("spaces of a search", _space, _read_space, share=0.3),
)
