"""Processes that train together have the same options, images and weights, or say who hasn't.

Nothing in training itself would show it: gradients of other classes, of other images or of another
learning rate are averaged as well. Digests are exchanged first, what differs only where those do;
every rank computes the same message from what all have sent, so all leave with it.

What is compared: every option but those that name a place on this machine (``PLACES``), packages
and code; classes; names and labels of all images, with the sizes of a few files; the weights to
start from, or the checkpoint. What is not: the contents of images.
"""

import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bounded
import utils
from checkpointing.folder import checkpoints_in
from config import Config, all_options, value_text
from distributed.agreement import digest, disagreement
from distributed.processes import Processes, gather
from errors import UserError, first_names, printable
from pipeline.dataset import ImageDataset
from pipeline.sources.base import FileSource, Source, Subset
from training.saving import versions

log = logging.getLogger(__name__)

# Options that may differ from machine to machine. What is found there is compared.
PLACES = {"config", "data_path", "image_root", "shard_cache", "cache_dir", "output_dir"}
# Of these it is compared whether they are given.
_FILES = {"resume", "finetune", "teacher_path"}
# Of a file that these name the content is compared; wherever it lies, and by whatever name.
_NAMED_FILES = {"albumentations", "class_weights", "pos_weight"}
_LABEL_FILES = {"class_map", "valid_labels", "real_labels"}
PLACES |= _LABEL_FILES
# How the processes meet, which they have, and what each does for itself.
_OWN = {"distributed", "world_size", "dist_url", "dist_start_timeout", "num_workers", "pin_mem"}
_OWN |= {"download", "loader_timeout", "shard_cache_gb", "cache_gb"}

_CHUNK = 4096  # images whose names and labels make one digest
_SPOTS = 4096  # images that are looked at where names aren't at hand
_STATS = 32  # files whose sizes are looked at
_MOST_BYTES = 64 << 20  # of a file whose content is compared
_ROOT = Path(__file__).parent.parent
_PACKAGES = ("architectures", "augmentation", "checkpointing", "config", "distributed", "outputs")
_PACKAGES += ("optimization", "pipeline", "training")


# --- options, before the first exchange -----------------------------------------------------------


def recipe_terms(config: Config, device: torch.device) -> dict[str, str]:
    """What all processes must have alike, as texts by name: options, device, packages, code."""
    values = config.flat()
    left_out = _OWN | PLACES - _LABEL_FILES - ({"output_dir"} if config.dist.fsdp else set())
    terms = {}
    for option in all_options():
        name, value = option.name, values[option.name]
        shown = value_text(value)
        if name in left_out:
            continue
        if name in _LABEL_FILES and value:
            shown = _content(Path(value).expanduser())
        elif name in _FILES and value not in ("", "auto", "timm"):
            shown = "a file"
        elif name in _NAMED_FILES and os.path.isfile(os.path.expanduser(value)):
            shown = _file_text(value)
        elif name == "plugin":
            shown = ", ".join(map(_plugin_text, config.run.plugin)) or "none"
        elif name == "device":
            shown = device.type
        elif name == "amp":
            kind = utils.amp_dtype(config.optim.amp, device)
            shown = "off" if kind is None else str(kind).removeprefix("torch.")
        terms[option.flag] = shown or "none"
    # Of timm the third number counts: with it come other models.
    terms |= {name: _release(text, 3 if name == "timm" else 2) for name, text in versions().items()}
    return terms | _code()


def _release(version: str, numbers: int) -> str:
    """The first ``numbers`` of a version: 2.9 of 2.9.1+cu128."""
    return ".".join(version.partition("+")[0].split(".")[:numbers])


def _plugin_text(name: str) -> str:
    """A plug-in by its name and, of a file, its content."""
    return _file_text(name) if name.endswith(".py") else name


def _file_text(name: str) -> str:
    """A file by its name and content: it may lie elsewhere on another machine."""
    path = Path(name).expanduser()
    return f"{path.name} ({_content(path)})"


def _content(path: Path) -> str:
    try:
        return f"content {_short(bounded.read_bytes(path, _MOST_BYTES))}"
    except OSError:
        return "which can't be read"


def _code() -> dict[str, str]:
    """The files of this project that are loaded: what else lies in its folder doesn't matter."""
    terms = {}
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__dict__", {}).get("__file__") or "")
        if _ROOT in path.parents:
            name = path.relative_to(_ROOT).as_posix()
            if "/" not in name or name.split("/")[0] in _PACKAGES:
                terms[name] = _content(path)
    return terms


def warn_of_versions(processes: Processes) -> None:
    """Warn where versions differ in what :func:`recipe_terms` leaves out; to be called by all."""
    everyone = gather(versions())
    for name in everyone[0]:
        texts = [each[name] for each in everyone]
        if text := disagreement(texts, processes, lambda value, name=name: f"has {name} {value}"):
            log.warning("%s: the same version everywhere is safer", text)


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


# --- images and classes ---------------------------------------------------------------------------


def agree_on_data(
    processes: Processes, parts: Mapping[str, ImageDataset], root: str | Path = ""
) -> None:
    """Raise UserError, on all ranks alike, unless all have the same classes, names and labels.

    To be called by all ranks.

    Args:
        processes: where this one stands.
        parts: the parts of the data set by what they are called: ``training``.
        root: ``--data-path``, which may be another one on each machine.
    """
    if not processes.distributed:
        return
    root = str(Path(root).expanduser())
    mine = {
        name: [digest(part.classes), len(part), _digests(part, root), _sizes(part.source)]
        for name, part in parts.items()
    }
    if len(set(gather(digest(mine)))) == 1:
        return
    found = []
    for name, part in parts.items():
        classes = _class_difference(processes, part.classes)
        images = _image_difference(processes, name, part, root, mine[name][2])
        sizes = _size_difference(processes, mine[name][3])
        # Of other classes all images follow.
        found += classes or [*images, *sizes]
    texts = list(dict.fromkeys(found))
    raise UserError(
        f"{'; '.join(texts[:3])}: give all processes the same data set (--data-path, --data-set)"
    )


def _identities(source: Source, indices: np.ndarray, root: str) -> list[bytes]:
    """What stays the names of images when the data set lies elsewhere."""
    if isinstance(source, Subset):
        return _identities(source.source, source.indices[indices], root)
    if isinstance(source, FileSource):
        return source.paths.chosen(indices)
    names = (os.fsencode(source.identity(index)) for index in indices.tolist())
    return [name.removeprefix(os.fsencode(root)) for name in names]


def _looked_at(source: Source) -> np.ndarray:
    """The images whose names are compared: all, or enough where each takes a while to find."""
    inner = source
    while isinstance(inner, Subset):
        inner = inner.source
    count = len(source)
    if isinstance(inner, FileSource) or count <= _SPOTS:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, _SPOTS).astype(np.int64))


def _items(part: ImageDataset, chunk: int, root: str) -> list[tuple[bytes, tuple[int, ...]]]:
    """Names and labels of a chunk of the images that are looked at; no labels where unknown."""
    indices = _looked_at(part.source)[chunk * _CHUNK : (chunk + 1) * _CHUNK]
    labels: list[tuple[int, ...]] = [()] * len(indices)
    if part.targets is not None:
        rows = part.targets[indices]
        several = rows.ndim == 2
        labels = [tuple(np.flatnonzero(r).tolist()) if several else (int(r),) for r in rows]
    return list(zip(_identities(part.source, indices, root), labels, strict=True))


def _digests(part: ImageDataset, root: str) -> list[str]:
    """A digest of each chunk of names and labels, and last one of all labels."""
    digests = []
    looked_at = _looked_at(part.source)
    for start in range(0, len(looked_at), _CHUNK):
        indices = looked_at[start : start + _CHUNK]
        if isinstance(part.source, FileSource):
            names = part.source.paths.run(start, start + len(indices))
        else:
            names = b"\0".join(_identities(part.source, indices, root))
        whole = hashlib.sha256(names)
        if part.targets is not None:
            whole.update(np.ascontiguousarray(part.targets[indices]).tobytes())
        digests.append(whole.hexdigest()[:16])
    labels = b"" if part.targets is None else np.ascontiguousarray(part.targets).tobytes()
    return [*digests, _short(labels)]


def _sizes(source: Source) -> list[tuple[str, int]]:
    """A few image files and their sizes in bytes; -1 where there is none to be had."""
    indices = np.unique(np.linspace(0, len(source) - 1, _STATS).astype(np.int64)).tolist()
    found = []
    while isinstance(source, Subset):
        indices, source = [int(source.indices[index]) for index in indices], source.source
    for index in indices if isinstance(source, FileSource) else ():
        try:
            size = os.stat(source.sample_id(index)).st_size
        except OSError:
            size = -1
        found.append((printable(source.identity(index)), size))
    return found


def _class_difference(processes: Processes, classes: list[str]) -> list[str]:
    everyone = gather(list(classes))
    for number in range(max(map(len, everyone))):
        names = [each[number] if number < len(each) else None for each in everyone]
        text = disagreement(names, processes, lambda name, at=number: _says_class(at, name))
        if text:
            return [text]
    return []


def _says_class(number: int, name: str | None) -> str:
    return f"has no class {number}" if name is None else f"has class {number} '{printable(name)}'"


def _image_difference(
    processes: Processes, name: str, part: ImageDataset, root: str, digests: list[str]
) -> list[str]:
    counts = gather(len(part))
    text = disagreement(counts, processes, lambda count: f"has {count:,} {name} images")
    found = [text] if text else []
    everyone = gather(digests[:-1])
    shortest = min(map(len, everyone))
    chunk = next((k for k in range(shortest) if len({d[k] for d in everyone}) > 1), shortest)
    chunks = gather(_items(part, chunk, root))
    for place in range(max(map(len, chunks))):
        images = [each[place] if place < len(each) else None for each in chunks]
        text = disagreement(images, processes, lambda image: _says_image(part, image))
        if text:
            return [*found, f"the first {name} image that differs: {text}"]
    return found


def _says_image(part: ImageDataset, image: tuple[bytes, tuple[int, ...]] | None) -> str:
    if image is None:
        return "has none"
    path, labels = image
    names = [f"'{printable(part.classes[i])}'" for i in labels if 0 <= i < len(part.classes)]
    says = f"has {printable(os.fsdecode(path))}"
    if part.targets is not None and part.targets.ndim == 2:
        return f"{says} with {'labels ' + first_names(names) if names else 'no label'}"
    return says + (f" of class {names[0]}" if names else "")


def _size_difference(processes: Processes, sizes: list[tuple[str, int]]) -> list[str]:
    everyone = gather(sizes)
    if len({tuple(name for name, _ in each) for each in everyone}) > 1:
        return []
    for place in range(len(sizes)):
        files = [each[place] for each in everyone]
        text = disagreement(files, processes, lambda file: f"has {file[0]} of {file[1]:,} bytes")
        if text:
            return [text]
    return []


# --- weights --------------------------------------------------------------------------------------


def await_newest(processes: Processes, folder: Path, timeout: float) -> None:
    """Wait until each process sees the newest checkpoint that the main one sees in ``folder``.

    A network file system may show another machine's files late: NFS after 60 s. To be called by
    all; whoever has waited ``timeout`` seconds goes on without it.
    """
    if not processes.distributed:
        return
    newest = gather([path.name for path in checkpoints_in(folder)[:1]])[0]
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if {path.name for path in checkpoints_in(folder)}.issuperset(newest):
            return
        time.sleep(0.2)


def agree_on_start(
    processes: Processes, source: str | None, content: Mapping[str, Any], *, scattered: bool
) -> None:
    """Raise UserError, on all ranks alike, unless all go on from the same checkpoint, or from none.

    Args:
        processes: where this one stands.
        source: the file or address of the checkpoint; None where the run starts anew.
        content: of the checkpoint.
        scattered: each process holds a part of the weights only.
    """
    if not processes.distributed:
        return
    says = "starts anew"
    if source is not None:
        progress = content.get("progress")
        progress = progress if isinstance(progress, Mapping) else {}
        model = content.get("model")
        weights = "" if scattered or not isinstance(model, Mapping) else _of_weights(model)
        says = (
            f"goes on from {printable(Path(source).name)} ({progress.get('epoch')} epochs done, "
            f"{progress.get('update')} updates" + (f", weights {weights})" if weights else ")")
        )
    text = disagreement(gather(says), processes, str)
    if text:
        raise UserError(f"{text}: all must read the same checkpoint (--resume, --output-dir)")


def agree_on_weights(processes: Processes, weights: Mapping[str, Any], what: str) -> None:
    """Raise UserError, on all ranks alike, unless the tensors of all are bitwise the same.

    Args:
        processes: where this one stands.
        weights: by name; what is no tensor isn't compared.
        what: whose they are, for the message: ``starts from``.
    """
    if not processes.distributed:
        return
    mine = dict(_tensor_digests(weights))
    if len(set(gather(digest(mine)))) == 1:
        return
    everyone = gather(mine)
    for name in dict.fromkeys(name for each in everyone for name in each):
        values = [each.get(name) for each in everyone]
        text = disagreement(
            values, processes, lambda value, name=name: f"has {_says_tensor(name, value)}"
        )
        if text:
            raise UserError(
                f"the processes {what} other weights: {text}: are the files that they start from "
                "the same, and the model?"
            )


def _says_tensor(name: str, value: str | None) -> str:
    return f"no layer {name}" if value is None else f"layer {name} with digest {value}"


def _of_weights(weights: Mapping[str, Any]) -> str:
    return digest(dict(_tensor_digests(weights)))[:12]


def _tensor_digests(weights: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name, tensor in weights.items():
        if isinstance(tensor, torch.Tensor):
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            yield str(name), f"{_short(values.numpy())} {list(tensor.shape)}"
