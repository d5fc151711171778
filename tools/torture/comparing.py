"""What two runs left that should be the same: checkpoints, ``log.txt``, TensorBoard's records."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from checkpointing.folder import load_newest

# Times and memory are of the session, and so is whether its first step has a rate.
_OF_THE_SESSION = ("images_per_second", "data_wait", "seconds", "memory_gib", "mfu")
_HPARAMS = "_hparams_/"
Records = dict[tuple[str, int], list[bytes]]


def differences(left: Path, right: Path) -> list[str]:
    """What differs between the last checkpoints, logs and event files of two runs' folders."""
    contents = [load_newest(folder)[1] for folder in (left, right)]
    for content in contents:
        for name in ("rng", "metrics", "versions"):  # metrics hold times; the log is compared
            del content[name]
    found = differing(*contents, "checkpoint")
    found += differing(*(log_of(folder) for folder in (left, right)), "log.txt")
    if (left / "tensorboard").exists():
        found += tensorboard_differences(left, right)
    return found


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's ``log.txt``, without times."""
    lines = (folder / "log.txt").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "epoch_seconds"} for line in lines]


def differing(left: Any, right: Any, where: str) -> list[str]:
    """The places at which nested containers of tensors and primitives differ."""
    if isinstance(left, torch.Tensor):
        same = isinstance(right, torch.Tensor) and torch.equal(left, right)
        return [] if same else [where]
    if isinstance(left, dict) and isinstance(right, dict):
        keys = left.keys() | right.keys()
        return [d for k in keys for d in differing(left.get(k), right.get(k), f"{where}.{k}")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        found = [] if len(left) == len(right) else [f"{where}: {len(left)} and {len(right)}"]
        pairs = enumerate(zip(left, right, strict=False))
        return found + [d for i, (a, b) in pairs for d in differing(a, b, f"{where}[{i}]")]
    return [] if left == right else [where]


# --- TensorBoard --------------------------------------------------------------------------------


def tensorboard_differences(left: Path, right: Path) -> list[str]:
    """Records that a run has twice, or that only one of the two has, or has otherwise.

    They are read from all files one after the other, and as TensorBoard itself shows them.
    """
    found = []
    for reader in (raw_records, shown_records):
        runs = [reader(folder / "tensorboard") for folder in (left, right)]
        for key in sorted(runs[0].keys() | runs[1].keys()):
            values = [run.get(key, []) for run in runs]
            name = f"{reader.__name__} {key[0]} at {key[1]}"
            found += [f"{name}: {len(v)} times" for v in values if len(v) > 1]
            if key[0].endswith(_OF_THE_SESSION):
                continue
            if key[0].startswith(_HPARAMS):  # the options name the folder
                values = [[b""] * len(v) for v in values]
            if values[0] != values[1]:
                found.append(f"{name}: {len(values[0])} and {len(values[1])} records, or others")
    return found


def raw_records(folder: Path) -> Records:
    """The values by tag and step in all event files of a folder."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    found: Records = defaultdict(list)
    for path in sorted(folder.iterdir()):
        for data in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(data)
            if event.HasField("graph_def"):
                found["graph", event.step].append(event.graph_def)
            for value in event.summary.value:
                found[value.tag, event.step].append(value.SerializeToString(deterministic=True))
    return dict(found)


def shown_records(folder: Path) -> Records:
    """The scalars, histograms and images of a folder that TensorBoard shows, by tag and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(
        str(folder), {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
    )
    accumulator.Reload()
    tags = accumulator.Tags()
    found: Records = defaultdict(list)
    for kind, events in (
        ("scalars", accumulator.Scalars),
        ("histograms", accumulator.Histograms),
        ("images", accumulator.Images),
    ):
        for tag in tags[kind]:
            for event in events(tag):
                found[tag, event.step].append(repr(replace(event, wall_time=0)).encode())
    return dict(found)
