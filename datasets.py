"""Data sets, and the loaders that make batches of them.

A data set is a ``Source`` (pictures by number, labels, class names) wrapped in an ``ImageDataset``,
which decodes, augments and copes with unreadable pictures. All sources have random access, the
sharded ones too, so that sampling, exact evaluation and resuming in mid-epoch work alike on all.
"""

import contextlib
import csv
import difflib
import functools
import gzip
import io
import itertools
import json
import logging
import os
import random
import shutil
import signal
import sys
import tarfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import BatchSampler, DataLoader, Sampler, get_worker_info
from torchvision.io import ImageReadMode, decode_jpeg

from augment import EvalTransform, Preprocessing, TrainTransform
from batch_augment import BatchAugment, Plan
from errors import DataError, OptionError
from remote import RemoteFolder, is_remote
from samplers import NUM_REPEATS, SampleKey
from utils import derive_seed, process_runs, seed_host

if TYPE_CHECKING:
    from config import AugmentOptions, DataOptions

logger = logging.getLogger(__name__)

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".bmp", ".gif", ".tif", ".tiff")
    + (".webp", ".avif", ".jp2")
)
FEW_CLASSES = 20  # each is named with its count
PREFETCH = 2  # batches that a loader process makes ahead
IMBALANCE = 10  # a most frequent class this many times the least frequent one is worth a warning


class Batch(NamedTuple):
    """A batch on the host. ``images`` is (0, 3, 0, 0) where every picture of it was left out."""

    images: torch.Tensor  # (B, 3, H, W): float32, normalised; or uint8, what is left to do in plan
    targets: torch.Tensor  # (B,) int64
    indices: torch.Tensor  # (B,) int64, data set indices
    positions: torch.Tensor  # (B,) int64, places in the epoch's global sequence
    bad: list[str]  # "path: reason" of each picture that couldn't be read
    plan: Plan | None = None  # of uint8 pictures: how to augment them; None: not at all


class Sample(NamedTuple):
    """A picture of a batch; ``image`` is None where it couldn't be read and has no replacement."""

    image: torch.Tensor | None
    target: int
    index: int
    epoch: int
    position: int
    bad: list[str]


# --- reading a picture --------------------------------------------------------------------------


class BadPictureError(Exception):
    """A picture that can't be decoded; the message is the reason."""


def decode(picture: Any) -> Image.Image:
    """A path, binary file, PIL picture or uint8 array (H, W) or (H, W, 3) as an RGB picture.

    Turned upright by its EXIF data; 16-bit, 32-bit and float greys are scaled to 8 bits,
    transparency is dropped. Raises BadPictureError.
    """
    # Pillow's plug-ins raise almost anything on a damaged file, and warn of what is still readable.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if isinstance(picture, np.ndarray):
                return Image.fromarray(picture).convert("RGB")
            if isinstance(picture, Image.Image):
                return _to_rgb(picture)
            with Image.open(picture) as image:
                image.load()
                return _to_rgb(_upright(image))
        except UnidentifiedImageError:
            raise BadPictureError("not a picture that Pillow can read") from None
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise BadPictureError(reason) from None


JPEG = b"\xff\xd8\xff"


def decode_tensor(picture: Any) -> torch.Tensor:
    """As ``decode``, to uint8 (3, H, W); JPEG files take a shorter way to the same pixels.

    Raises BadPictureError.
    """
    if isinstance(picture, str | Path | io.BytesIO):
        content = picture.getvalue() if isinstance(picture, io.BytesIO) else _file_content(picture)
        tensor = _decode_jpeg(content) if content.startswith(JPEG) else None
        if tensor is not None:
            return tensor
        picture = io.BytesIO(content)
    return _channels_first(np.array(decode(picture)))


def _file_content(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadPictureError(error.strerror or str(error)) from None


def _decode_jpeg(content: bytes) -> torch.Tensor | None:
    """uint8 (3, H, W), or None where Pillow had better look at it (damaged, CMYK)."""
    with warnings.catch_warnings():
        # That it will move to another package, and that bytes can't be written to.
        warnings.simplefilter("ignore")
        encoded = torch.frombuffer(content, dtype=torch.uint8)
        try:
            image = decode_jpeg(encoded, ImageReadMode.UNCHANGED, apply_exif_orientation=True)
        except RuntimeError:
            return None
    if image.shape[0] == 1:
        return image.expand(3, -1, -1)
    return image if image.shape[0] == 3 else None


def _channels_first(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) as (3, H, W), in the same memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    # Broken EXIF data is no reason to lose a picture whose pixels are fine.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _to_8bit(image).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8bit(image: Image.Image) -> Image.Image:
    """Greys of more than 8 bits, scaled by the full range that the mode and the values tell."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    peak = values.max()
    ranges = (65535,) if image.mode.startswith("I;16") else (255, 65535)
    if image.mode == "F":
        ranges = (1, *ranges)
    full = next((r for r in ranges if peak <= r), peak)
    return Image.fromarray(np.rint(values.clip(0) * (255 / full)).astype(np.uint8))


# --- sources ------------------------------------------------------------------------------------


class Source:
    """Pictures by number. A plug-in's data set is a subclass, or one of the ready-made ones below.

    classes: names, in the order of the labels
    targets: label of each picture, (N,) int64; None if only reading a picture tells
    """

    classes: list[str]
    targets: np.ndarray | None
    groups: np.ndarray | None = (
        None  # (N,) int64: number of the file where a picture is one of many
    )

    def __len__(self) -> int:
        return len(self.targets)

    def open(self, index: int) -> Any:
        """What ``decode`` takes: a path, binary file, PIL picture or uint8 array."""
        raise NotImplementedError

    def read(self, index: int) -> tuple[Any, int]:
        """The picture as of ``open``, and its label."""
        return self.open(index), int(self.targets[index])

    def sample_id(self, index: int) -> str:
        """What to call the picture in a message."""
        raise NotImplementedError


class FileSource(Source):
    """Picture files below ``root``."""

    def __init__(
        self, root: Path, paths: Sequence[str], targets: Sequence[int], classes: list[str]
    ) -> None:
        self.root = root
        # A list of strings would be copied to every loader process as its reference counts change.
        self.paths = np.array([os.fsencode(p) for p in paths], dtype=np.bytes_)
        self.targets = np.asarray(targets, dtype=np.int64)
        self.classes = classes

    def open(self, index: int) -> str:
        return self.sample_id(index)

    def sample_id(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[index]))


class ArraySource(Source):
    """Pictures in memory: uint8 (N, H, W) or (N, H, W, 3)."""

    def __init__(
        self, images: np.ndarray, targets: Sequence[int], classes: list[str], name: str
    ) -> None:
        self.images = images
        self.targets = np.asarray(targets, dtype=np.int64)
        self.classes = classes
        self.name = name

    def open(self, index: int) -> np.ndarray:
        return self.images[index]

    def sample_id(self, index: int) -> str:
        return f"{self.name}#{index}"


class Subset(Source):
    """Some pictures of another source, in the order of ``indices``."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        self.classes = source.classes
        self.targets = None if source.targets is None else source.targets[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, index: int) -> Any:
        return self.source.open(self.indices[index])

    def read(self, index: int) -> tuple[Any, int]:
        return self.source.read(self.indices[index])

    def sample_id(self, index: int) -> str:
        return self.source.sample_id(self.indices[index])


def stratified_split(
    labels: Sequence[int], fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices for training and for validation, each sorted.

    ``fraction`` of every class is held out, rounded, but a class of two or more has at least one
    picture on either side. A class of one goes to training.
    """
    labels = np.asarray(labels)
    rng = np.random.RandomState(seed % 2**32)  # its stream, unlike Generator's, is fixed for good
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        held_out[members[:count]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _held_out(source: Source, is_train: bool, fraction: float, seed: int) -> Source:
    return Subset(source, stratified_split(source.targets, fraction, seed)[0 if is_train else 1])


def _no_split_wanted(data: "DataOptions", what: str) -> None:
    if data.val_fraction is not None:
        raise OptionError("val_fraction", f"{what} has its own validation part: leave it out")


def _root(data: "DataOptions") -> Path:
    if not data.data_path:
        raise OptionError("data_path", f"{data.data_set} needs the folder of the data set")
    root = Path(data.data_path).expanduser()
    if not root.exists():
        raise OptionError("data_path", f"{root} does not exist")
    return root


def _first_existing(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.exists()), None)


_VAL_NAMES = ("val", "valid", "validation", "test")


# --- folders ------------------------------------------------------------------------------------


def _subfolders(root: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))


def _scan(root: Path, classes: list[str]) -> FileSource:
    """The picture files of ``root/CLASS``, at any depth."""
    paths, targets, ignored = [], [], 0
    for label, name in enumerate(classes):
        for folder, subfolders, files in os.walk(root / name, followlinks=True):
            subfolders[:] = sorted(f for f in subfolders if not f.startswith("."))
            for file in sorted(files):
                if os.path.splitext(file)[1].lower() in EXTENSIONS and not file.startswith("."):
                    paths.append(os.path.relpath(os.path.join(folder, file), root))
                    targets.append(label)
                else:
                    ignored += 1
    if ignored:
        logger.info("%s: %d files that are not pictures were ignored", root, ignored)
    return FileSource(root, paths, targets, classes)


def _scan_train(root: Path) -> FileSource:
    classes = _subfolders(root)
    if not classes:
        raise DataError(f"{root} has no class folders: one folder a class, its pictures inside")
    source = _scan(root, classes)
    counts = np.bincount(source.targets, minlength=len(classes))
    for name, count in zip(classes, counts, strict=True):
        if not count:
            raise DataError(f"{root / name} holds no pictures: fill or remove the folder")
    return source


def _image_folder(is_train: bool, data: "DataOptions", seed: int) -> Source:
    root = _root(data)
    if root.is_file():
        raise OptionError("data_path", f"{root} is a file: give a folder, or add --data-set CSV")
    layouts = (
        "expected train/CLASS/PICTURE and val/CLASS/PICTURE (or valid, validation, test), "
        "or CLASS/PICTURE with --val-fraction 0.1"
    )
    train = root / "train"
    val = _first_existing(root / name for name in _VAL_NAMES)
    if not train.is_dir():
        if val is not None or not _subfolders(root):
            raise OptionError("data_path", f"{root} has no train/ folder: {layouts}")
        if data.val_fraction is None:
            raise OptionError("data_path", f"{root} has no train/ and val/ folders: {layouts}")
        train = root
    if val is None:
        if data.val_fraction is None:
            raise OptionError(
                "data_path", f"{root} has no val/ folder: add one, or --val-fraction 0.1"
            )
        return _held_out(_scan_train(train), is_train, data.val_fraction, seed)
    _no_split_wanted(data, str(root))
    if is_train:
        return _scan_train(train)
    return _scan_val(val, _subfolders(train), str(train))


def _scan_val(val: Path, classes: list[str], reference: str) -> FileSource:
    """The pictures of ``val``; its folders must be among the ``classes`` of ``reference``."""
    for name in _subfolders(val):
        if name not in classes:
            raise DataError(f"{val / name}: no class of that name in {reference}")
    source = _scan(val, classes)
    counts = np.bincount(source.targets, minlength=len(classes))
    missing = [name for name, count in zip(classes, counts, strict=True) if not count]
    if missing:
        logger.warning("%s has no pictures of %d classes: %s", val, len(missing), _list(missing))
    return source


def _folders_of(data: "DataOptions", classes: list[str]) -> Source | None:
    """Class folders of a set without a training part, for a model that knows its classes."""
    root = _root(data)
    if (root / "train").is_dir() or root.is_file():
        return None
    val = _first_existing(root / name for name in _VAL_NAMES)
    if val is None and data.val_fraction is None:
        val = root
    return None if val is None else _scan_val(val, classes, "the model")


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


# --- iNaturalist --------------------------------------------------------------------------------


class INatDataset(FileSource):
    """iNaturalist 2018 or 2019, with any level of the taxonomy as the class.

    ``root`` holds ``train{year}.json``, ``val{year}.json``, ``categories.json`` and the pictures
    at the ``file_name`` of the JSON or, as DeiT has them, without its second folder. Classes are in
    the order in which the training annotations name them, as DeiT numbers them.
    """

    def __init__(
        self, root: str | Path, train: bool = True, year: int = 2018, category: str = "name"
    ) -> None:
        root = Path(root)
        levels = _read_json(root / "categories.json")
        part = _read_json(root / f"{'train' if train else 'val'}{year}.json")
        reference = part if train else _read_json(root / f"train{year}.json")
        try:
            level_of = {int(c.get("id", i)): c for i, c in enumerate(levels)}
            if category not in levels[0]:
                known = ", ".join(k for k in levels[0] if k != "id")
                message = f"{category!r} is not in {root / 'categories.json'}, only {known}"
                raise OptionError("inat_category", message)
            label_of: dict[str, int] = {}
            for annotation in reference["annotations"]:
                name = level_of[int(annotation["category_id"])][category]
                label_of.setdefault(name, len(label_of))
            names = {
                a["image_id"]: level_of[int(a["category_id"])][category]
                for a in part["annotations"]
            }
            paths = [image["file_name"] for image in part["images"]]
            unknown = sorted({n for n in names.values() if n not in label_of})
            if unknown:
                raise DataError(f"{root}/val{year}.json: not in train{year}.json: {_list(unknown)}")
            targets = [label_of[names[image["id"]]] for image in part["images"]]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(
                f"{root}: the JSON files don't have iNaturalist's form ({error!r})"
            ) from None
        if paths and not (root / paths[0]).exists():
            shortened = [_without_second_folder(path) for path in paths]
            paths = shortened if (root / shortened[0]).exists() else paths
        super().__init__(root, paths, targets, list(label_of))


def _without_second_folder(path: str) -> str:
    first, *rest = path.split("/")
    return "/".join([first, *rest[1:]])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OptionError("data_path", f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read: {error}") from None


def _inat(year: int) -> "Factory":
    def factory(is_train: bool, data: "DataOptions", seed: int) -> Source:
        _no_split_wanted(data, "iNaturalist")
        return INatDataset(_root(data), train=is_train, year=year, category=data.inat_category)

    return factory


# --- CSV ----------------------------------------------------------------------------------------

_PATH_COLUMNS = ("path", "image", "file", "filename", "filepath", "image_path", "file_name", "img")
_LABEL_COLUMNS = ("label", "class", "target", "category", "class_name")


def _read_csv(path: Path) -> tuple[list[str], list[str], list[int]]:
    """Picture paths, labels and line numbers of a CSV file; a header is optional."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}") from None
    first_line = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t|", key=first_line.count)
    if delimiter not in first_line:
        raise DataError(f"{path}, line 1: expected two columns, a picture's path and its label")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None
    rows = [(number, row) for number, row in rows if any(row)]
    width, columns = len(rows[0][1]), _csv_columns(path, rows[0][1])
    if columns is None:
        columns = (0, 1)
        if width != 2 or not (path.parent / rows[0][1][0]).exists():
            raise DataError(
                f"{path}, line 1: neither a header (path{delimiter}label) nor "
                "a picture that exists and its label"
            )
    else:
        rows = rows[1:]
    for number, row in rows:
        if len(row) != width:
            raise DataError(f"{path}, line {number}: {len(row)} columns instead of {width}")
        for column, what in zip(columns, ("path", "label"), strict=True):
            if not row[column]:
                raise DataError(f"{path}, line {number}: no {what}")
    if not rows:
        raise DataError(f"{path} has no pictures")
    paths, labels = ([row[column] for _, row in rows] for column in columns)
    return paths, labels, [number for number, _ in rows]


def _csv_columns(path: Path, header: list[str]) -> tuple[int, int] | None:
    names = [name.lower() for name in header]
    found = [
        next((names.index(n) for n in usual if n in names), None)
        for usual in (_PATH_COLUMNS, _LABEL_COLUMNS)
    ]
    if found == [None, None]:
        return None
    for column, usual in zip(found, (_PATH_COLUMNS, _LABEL_COLUMNS), strict=True):
        if column is None:
            raise DataError(f"{path}, line 1: no column named {', '.join(usual[:4])}")
    return found[0], found[1]


def _csv_source(path: Path, classes: list[str] | None = None) -> FileSource:
    paths, labels, numbers = _read_csv(path)
    if classes is None:
        numeric = all(label.lstrip("-").isdigit() for label in labels)
        classes = sorted(set(labels), key=int if numeric else None)
    label_of = {name: label for label, name in enumerate(classes)}
    for number, label in zip(numbers, labels, strict=True):
        if label not in label_of:
            raise DataError(f"{path}, line {number}: no class {label!r} in the training part")
    return FileSource(path.parent, paths, [label_of[label] for label in labels], classes)


def _csv(is_train: bool, data: "DataOptions", seed: int) -> Source:
    root = _root(data)
    train = root if root.is_file() else root / "train.csv"
    if not train.is_file():
        raise OptionError("data_path", f"{train} does not exist: give a CSV file, or its folder")
    val = None if root.is_file() else _first_existing(root / f"{n}.csv" for n in _VAL_NAMES)
    if val is None:
        if data.val_fraction is None:
            raise OptionError(
                "val_fraction", f"{train} has no val.csv beside it: add --val-fraction 0.1"
            )
        return _held_out(_csv_source(train), is_train, data.val_fraction, seed)
    _no_split_wanted(data, str(root))
    source = _csv_source(train)
    return source if is_train else _csv_source(val, source.classes)


def _csv_of(data: "DataOptions", classes: list[str]) -> Source | None:
    """A CSV file without a training part, for a model that knows its classes."""
    root = _root(data)
    if root.is_file():
        return _csv_source(root, classes) if data.val_fraction is None else None
    val = _first_existing(root / f"{name}.csv" for name in _VAL_NAMES)
    return None if val is None or (root / "train.csv").exists() else _csv_source(val, classes)


# --- small sets ---------------------------------------------------------------------------------


def _cifar(name: str) -> "Factory":
    def factory(is_train: bool, data: "DataOptions", seed: int) -> Source:
        from torchvision import datasets as torchvision_datasets

        _no_split_wanted(data, name)
        root = _download_root(data)
        kind = getattr(torchvision_datasets, name)
        if root.name == kind.base_folder:
            root = root.parent
        dataset = _fetch(lambda: kind(root, train=is_train, download=data.download), name, data)
        part = f"{name} {'train' if is_train else 'test'}"
        return ArraySource(dataset.data, dataset.targets, dataset.classes, part)

    return factory


def _download_root(data: "DataOptions") -> Path:
    """``data_path``, which need not exist if the set is to be downloaded into it."""
    return Path(data.data_path).expanduser() if data.download and data.data_path else _root(data)


def _fetch(make: Callable[[], Any], name: str, data: "DataOptions") -> Any:
    try:
        return make()
    except (OSError, RuntimeError) as error:
        if data.download:
            raise DataError(f"{name} can't be downloaded: {error}") from None
        raise OptionError(
            "data_path", f"no {name}, or a damaged one, in {data.data_path}: add --download"
        ) from None


_FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker"]
_IDX_CLASSES = {
    "MNIST": [str(digit) for digit in range(10)],
    "FashionMNIST": [*_FASHION, "Bag", "Ankle boot"],
}


def _idx(name: str) -> "Factory":
    """MNIST or FashionMNIST from its IDX files."""

    def factory(is_train: bool, data: "DataOptions", seed: int) -> Source:
        _no_split_wanted(data, name)
        root = _download_root(data)
        prefix = "train" if is_train else "t10k"
        if data.download and _find_idx(root, name, f"{prefix}-images") is None:
            from torchvision import datasets as torchvision_datasets

            _fetch(lambda: getattr(torchvision_datasets, name)(root, download=True), name, data)
        arrays = []
        for part, dimensions in (("images", 3), ("labels", 1)):
            path = _find_idx(root, name, f"{prefix}-{part}")
            if path is None:
                raise OptionError(
                    "data_path",
                    f"no {prefix}-{part}-idx{dimensions}-ubyte(.gz) in {root}: add --download",
                )
            arrays.append(read_idx(path, dimensions))
        images, labels = arrays
        if len(images) != len(labels):
            raise DataError(f"{path}: {len(labels)} labels for {len(images)} pictures")
        return ArraySource(images, labels, _IDX_CLASSES[name], f"{name} {prefix}")

    return factory


def _find_idx(root: Path, name: str, stem: str) -> Path | None:
    folders = (root, root / name / "raw", root / "raw")
    digits = 3 if stem.endswith("images") else 1
    endings = (f"-idx{digits}-ubyte", f".idx{digits}-ubyte")
    return _first_existing(
        folder / f"{stem}{ending}{gz}"
        for folder in folders
        for ending in endings
        for gz in ("", ".gz")
    )


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file, plain or gzipped (format: yann.lecun.com/exdb/mnist)."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise DataError(f"{path} can't be read: {error}") from None
    # Two zero bytes, the type (8: unsigned byte), the number of dimensions, each size big-endian.
    if content[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{path} is not an IDX file of bytes in {dimensions} dimensions")
    start = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:start], dtype=">u4").astype(int).tolist()
    if len(shape) != dimensions or len(content) != start + int(np.prod(shape)):
        raise DataError(f"{path} is damaged: {len(content)} bytes don't fit its sizes {shape}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _digits(is_train: bool, data: "DataOptions", seed: int) -> Source:
    """scikit-learn's 1797 handwritten digits, 8×8; the split is the same for every seed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise OptionError(
            "data_set", "DIGITS needs scikit-learn: pip install scikit-learn"
        ) from None
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    source = ArraySource(images, digits.target, [str(d) for d in digits.target_names], "DIGITS")
    return _held_out(source, is_train, data.val_fraction or 0.2, seed=0)


# --- timm's readers -----------------------------------------------------------------------------


class ShardSource(Source):
    """Tar shards in webdataset's form, with random access by an index of each.

    Remote ones are fetched whole when a picture of theirs is first needed.

    The index is read where ``tools.data pack`` left one, else made from the tar's headers.

    A sample is the run of members with the same name up to the first dot: a picture and ``.cls``
    (its label as a number) or ``.json`` with ``label``. Classes have numbers for names, unless
    ``_info.json`` lists them as ``classes``.
    """

    MOST_OPEN = 64  # files of a process

    def __init__(
        self,
        shards: Sequence[Path],
        classes: list[str] | None = None,
        remote: RemoteFolder | None = None,
    ) -> None:
        self.shards = list(shards)
        self.remote = remote
        self._files: dict[int, IO[bytes]] = {}  # the one used last comes last
        if remote is None:
            tables = [ShardIndex.read(shard) or ShardIndex.scan(shard) for shard in self.shards]
        else:
            tables = _fetch_indices(remote, self.shards)
        self.sizes = [table.shard_bytes for table in tables]
        if not any(len(table.targets) for table in tables):
            raise DataError(f"no samples in {_list([str(s) for s in self.shards])}")
        numbers = np.repeat(np.arange(len(tables)), [len(table.targets) for table in tables])
        places = np.concatenate([table.places for table in tables])
        self.entries = np.column_stack([numbers, places])  # (N, 3): shard, offset, size
        self.groups = numbers
        self.targets = np.concatenate([table.targets for table in tables])
        self.keys = np.concatenate([table.keys for table in tables])
        self.classes = classes or [str(label) for label in range(self.targets.max() + 1)]
        wrong = np.flatnonzero((self.targets < 0) | (self.targets >= len(self.classes)))
        if len(wrong):
            raise DataError(
                f"{self.sample_id(wrong[0])}: label {self.targets[wrong[0]]} is none of the "
                f"{len(self.classes)} classes of the training part"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def open(self, index: int) -> io.BytesIO:
        shard, offset, size = self.entries[index].tolist()
        # Loader processes that were forked share a file's place, so none may rely on it.
        return io.BytesIO(os.pread(self._file(shard).fileno(), size, offset))

    def _file(self, shard: int) -> IO[bytes]:
        file = self._files.pop(shard, None)
        if file is None:
            path = self.shards[shard]
            if self.remote is not None:
                name = path.relative_to(self.remote.folder).as_posix()
                path = self.remote.fetch(name, self.sizes[shard])
            file = open(path, "rb")  # noqa: SIM115 (it stays open)
            if hasattr(os, "posix_fadvise"):
                # Others of this file come soon: let the system read it from front to back.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        self._files[shard] = file
        if len(self._files) > self.MOST_OPEN:
            self._files.pop(next(iter(self._files))).close()
        return file

    def sample_id(self, index: int) -> str:
        return f"{self.shards[self.entries[index, 0]]}:{os.fsdecode(self.keys[index])}"


class ShardIndex(NamedTuple):
    """Where the pictures of a shard are."""

    places: np.ndarray  # (N, 2) int64: offset and size in bytes
    targets: np.ndarray  # (N,) int64
    keys: np.ndarray  # (N,) bytes: names without extension
    shard_bytes: int

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int, str]], shard_bytes: int) -> "ShardIndex":
        """The index of rows of offset, size, label and key."""
        places = np.array([row[:2] for row in rows], dtype=np.int64).reshape(-1, 2)
        targets = np.array([row[2] for row in rows], dtype=np.int64)
        keys = np.array([os.fsencode(row[3]) for row in rows], np.bytes_)
        return cls(places, targets, keys, shard_bytes)

    @classmethod
    def scan(cls, shard: Path) -> "ShardIndex":
        """From the headers of the tar file, all of which are read."""
        rows = []
        for key, members in _shard_samples(shard):
            picture = next((m for e, m in members.items() if f".{e}" in EXTENSIONS), None)
            if picture is None:
                raise DataError(f"{shard}: sample {key} has no picture")
            label = _shard_label(shard, key, members)
            rows.append((picture.offset_data, picture.size, label, key))
        return cls.of(rows, shard.stat().st_size)

    @classmethod
    def read(cls, shard: Path, *, there: bool = True) -> "ShardIndex | None":
        """The index beside ``shard``; None if there is none for a shard of its name and size.

        ``there``: the shard is a file already, whose size can be compared.
        """
        path = cls.path(shard)
        try:
            with np.load(path, allow_pickle=False) as saved:
                size = int(saved["shard_bytes"])
                if saved["shard"] == shard.name and (not there or size == shard.stat().st_size):
                    return cls(*(saved[name] for name in cls._fields[:3]), size)
            reason = "is of another shard"
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            reason = f"can't be read ({error})"
        logger.warning("%s %s: the shard is scanned in its place", path, reason)
        return None

    def write(self, shard: Path) -> None:
        """Put the index beside ``shard``, which must be whole."""
        np.savez(self.path(shard), shard=shard.name, **self._asdict())

    @staticmethod
    def path(shard: Path) -> Path:
        """The file that holds the index of ``shard``."""
        return shard.with_suffix(".index.npz")


class _Member(NamedTuple):
    offset_data: int
    size: int
    content: bytes  # of labels; pictures stay on disk


def _shard_samples(shard: Path) -> Iterator[tuple[str, dict[str, _Member]]]:
    """(key, member by extension) of each sample, in the order of the shard."""
    current, members = None, {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                folder, name = os.path.split(info.name)
                stem, dot, extension = name.partition(".")
                if not info.isfile() or not stem or not dot:
                    continue
                key = os.path.join(folder, stem)
                if key != current and members:
                    yield current, members
                    members = {}
                current = key
                extension = extension.lower()
                is_label = extension in ("cls", "json")
                content = tar.extractfile(info).read() if is_label else b""
                members[extension] = _Member(info.offset_data, info.size, content)
                tar.members = []  # or tarfile keeps them all
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{shard} is not a plain tar file that can be read: {error}") from None
    if members:
        yield current, members


def _shard_label(shard: Path, key: str, members: dict[str, _Member]) -> int:
    try:
        if "cls" in members:
            return int(members["cls"].content)
        return int(json.loads(members["json"].content)["label"])
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{shard}: sample {key} needs its label as .cls, or as 'label' of .json"
        ) from None


def _fetch_indices(remote: RemoteFolder, shards: Sequence[Path]) -> list[ShardIndex]:
    """The indices of remote shards, which can't be scanned without fetching them all."""

    def fetch(shard: Path) -> ShardIndex:
        name = ShardIndex.path(shard).relative_to(remote.folder).as_posix()
        try:
            remote.fetch(name)
        except OSError as error:
            raise DataError(f"{error}; python -m tools.data pack writes the index") from None
        index = ShardIndex.read(shard, there=False)
        if index is None:
            ShardIndex.path(shard).unlink(missing_ok=True)
            raise DataError(f"{remote.address}/{name} is not the index of its shard")
        return index

    with ThreadPoolExecutor(max_workers=16) as pool:
        return list(pool.map(fetch, shards))


def _remote_shards(is_train: bool, data: "DataOptions") -> Source:
    """The shards of ``_info.json`` at an address."""
    remote = RemoteFolder(data.data_path, data.shard_cache, int(data.shard_cache_gb * 1e9))
    try:
        # It may have changed since: small enough to be fetched each time.
        remote.path("_info.json").unlink(missing_ok=True)
        info = _read_json(remote.fetch("_info.json"))
    except OSError as error:
        raise OptionError("data_path", f"{error}; python -m tools.data pack writes it") from None
    names = ("train", "training") if is_train else _VAL_NAMES
    known = info.get("splits", {})
    files = next((known[s]["filenames"] for s in names if s in known), None)
    if not files:
        raise OptionError("data_path", f"{remote.address}/_info.json has no split {names[0]}")
    classes = info.get("classes")
    if classes is None and not is_train:
        classes = _remote_shards(True, data).classes
    return ShardSource([remote.path(file) for file in files], classes, remote)


def _webdataset(name: str, is_train: bool, data: "DataOptions") -> Source:
    """Shards of a split: those of ``_info.json``, or ``*train*.tar`` and ``*val*.tar``."""
    _no_split_wanted(data, "a sharded set")
    if is_remote(data.data_path):
        return _remote_shards(is_train, data)
    root = _root(data)
    train = _shards(root, ("train", "training"))
    if not train:
        raise OptionError("data_path", f"{root} has no shards *train*.tar and no _info.json")
    source = ShardSource(train, _shard_info(root).get("classes"))
    if is_train:
        return source
    val = _shards(root, _VAL_NAMES)
    if not val:
        raise OptionError("data_path", f"{root} has no shards *val*.tar (nor *test*.tar)")
    return ShardSource(val, source.classes)


def _shards(root: Path, splits: Sequence[str]) -> list[Path]:
    known = _shard_info(root).get("splits")
    if known is not None:
        files = next((known[s]["filenames"] for s in splits if s in known), [])
        return [root / file for file in files]
    for split in splits:
        found = sorted({*root.glob(f"*{split}*.tar"), *root.glob(f"{split}/**/*.tar")})
        if found:
            return found
    return []


def _shard_info(root: Path) -> dict[str, Any]:
    info = _first_existing((root / "_info.json", root / "info.json"))
    return {} if info is None else {"splits": {}, **_read_json(info)}


class HuggingFaceSource(Source):
    """A Hugging Face data set with the columns ``image`` and ``label``, read by timm."""

    def __init__(self, name: str, root: str | None, split: str) -> None:
        self.name, self.root, self.split = name, root, split
        self._open_reader()
        labels = self.reader.dataset[self.reader.label_key]
        self.targets = np.array(list(labels), dtype=np.int64)
        class_to_idx = self.reader.class_to_idx
        numbered = [str(label) for label in range(self.targets.max() + 1)]
        self.classes = sorted(class_to_idx, key=class_to_idx.get) or numbered

    def _open_reader(self) -> None:
        from timm.data.readers import create_reader

        with _hugging_face():
            self.reader = create_reader(f"hfds/{self.name}", root=self.root, split=self.split)
            _ = self.reader[0]  # so that the package has imported all it needs

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "reader": None}

    def open(self, index: int) -> Any:
        if self.reader is None:
            self._open_reader()
        return self.reader[int(index)][0]

    def sample_id(self, index: int) -> str:
        return f"hfds/{self.name} {self.split}#{index}"


_hugging_face_package: Any = None


@contextlib.contextmanager
def _hugging_face() -> Iterator[None]:
    """Inside, ``datasets`` means the Hugging Face package, which has this module's name.

    For opening a set only: other threads of a loader process pickle this module's classes.
    """
    global _hugging_face_package
    ours, path, here = sys.modules[__name__], sys.path, Path(__file__).resolve().parent
    del sys.modules["datasets"]
    if _hugging_face_package is not None:
        sys.modules["datasets"] = _hugging_face_package
    sys.path = [p for p in path if Path(p or ".").resolve() != here]
    try:
        import datasets as package

        _hugging_face_package = package
        yield
    finally:
        sys.path = path
        sys.modules["datasets"] = ours


def _hugging_face_set(name: str, is_train: bool, data: "DataOptions") -> Source:
    _no_split_wanted(data, "a Hugging Face set")
    root = data.data_path or None
    splits = ("train",) if is_train else ("validation", *_VAL_NAMES)
    for split in dict.fromkeys(splits):
        try:
            source = HuggingFaceSource(name, root, split)
        except ImportError:
            raise OptionError("data_set", "hfds/ needs: pip install datasets") from None
        except ValueError as error:
            # What the package raises for an unknown split.
            problem = error
            continue
        except (OSError, RuntimeError, KeyError) as error:
            raise DataError(f"hfds/{name} can't be read: {error}") from None
        if source.targets.min() < 0:
            raise DataError(f"hfds/{name}: the split {split} has pictures without a label")
        return source
    raise DataError(f"hfds/{name} has none of the splits {', '.join(splits)}: {problem}")


class TensorFlowSource(Source):
    """A set of tensorflow-datasets, as its random access data source (needs array_record files)."""

    targets = None

    def __init__(self, name: str, root: str | None, split: str, download: bool) -> None:
        import tensorflow_datasets as tfds

        self.name, self.split = name, split
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
        if download:
            builder.download_and_prepare()
        skip = {"image": tfds.decode.SkipDecoding()}  # bytes: decoded here, like all others
        self.records = builder.as_data_source(split=split, decoders=skip)
        self.classes = list(builder.info.features["label"].names)

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> tuple[io.BytesIO, int]:
        record = self.records[int(index)]
        return io.BytesIO(record["image"]), int(record["label"])

    def sample_id(self, index: int) -> str:
        return f"tfds/{self.name} {self.split}#{index}"


def _tensorflow_set(name: str, is_train: bool, data: "DataOptions") -> Source:
    _no_split_wanted(data, "a tensorflow-datasets set")
    root = data.data_path or None
    splits = ("train",) if is_train else ("validation", "test")
    problem: Exception | None = None
    for split in splits:
        try:
            return TensorFlowSource(name, root, split, data.download)
        except ImportError as error:
            raise OptionError(
                "data_set",
                "tfds/ needs: pip install tensorflow-datasets array_record, and tensorflow for "
                f"--download ({error})",
            ) from None
        except (OSError, ValueError, KeyError, AssertionError, NotImplementedError) as error:
            problem = error
    raise DataError(
        f"tfds/{name} can't be read: {problem} (it must be prepared as array_record; "
        "--download does so)"
    )


# --- the data set -------------------------------------------------------------------------------

Factory = Callable[[bool, "DataOptions", int], Source]

_REGISTRY: dict[str, Factory] = {
    "IMNET": _image_folder,
    "CIFAR": _cifar("CIFAR100"),
    "CIFAR10": _cifar("CIFAR10"),
    "CIFAR100": _cifar("CIFAR100"),
    "MNIST": _idx("MNIST"),
    "FMNIST": _idx("FashionMNIST"),
    "INAT": _inat(2018),
    "INAT19": _inat(2019),
    "CSV": _csv,
    "DIGITS": _digits,
}
_ALONE = {"IMNET": _folders_of, "CSV": _csv_of}
_READERS = {"wds": _webdataset, "hfds": _hugging_face_set, "tfds": _tensorflow_set}


def register_dataset(name: str) -> Callable[[Factory], Factory]:
    """Decorator for plug-ins: ``factory(is_train, data_options, seed) -> Source`` as a data set.

    Both parts must have the same class list.
    """

    def register(factory: Factory) -> Factory:
        _REGISTRY[name.upper()] = factory
        return factory

    return register


@contextlib.contextmanager
def _host_generators(seed: int) -> Iterator[None]:
    """Seed the host's global generators, and put them back as they were afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_host(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class ImageDataset(torch.utils.data.Dataset[Sample]):
    """A source with its transform. ``dataset[SampleKey]`` is a function of seed and key alone.

    With ``on_bad_image`` "skip" an unreadable picture is replaced in training, by the next readable
    one, and left out in evaluation. With "error" it is left out here, and the loader raises.
    """

    MOST_REPLACEMENTS = 100

    def __init__(
        self,
        source: Source,
        transform: Callable[..., torch.Tensor] | BatchAugment,
        *,
        seed: int = 0,
        is_train: bool = False,
        on_bad_image: str = "error",
    ) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.is_train = is_train
        self.on_bad_image = on_bad_image
        self.given_up: dict[int, str] = {}  # pictures not to be tried again, and why
        self.places = Places(0)

    @property
    def classes(self) -> list[str]:
        return self.source.classes

    @property
    def targets(self) -> np.ndarray | None:
        """Labels, (N,) int64, or None where only reading a picture tells."""
        return self.source.targets

    def __len__(self) -> int:
        return len(self.source)

    def sample_id(self, index: int) -> str:
        """The path of a picture, or what else it is called, on one line that a terminal can show.

        A file name may hold anything, line ends and a terminal's commands too.
        """
        name = self.source.sample_id(index)
        return name if name.isprintable() else name.encode("unicode_escape").decode()

    def subset(self, indices: Sequence[int]) -> "ImageDataset":
        """The pictures of ``indices`` alone, renumbered."""
        return ImageDataset(
            Subset(self.source, indices),
            self.transform,
            seed=self.seed,
            is_train=self.is_train,
            on_bad_image=self.on_bad_image,
        )

    def __getitem__(self, key: SampleKey | int) -> Sample:
        if not isinstance(key, SampleKey):
            key = SampleKey(int(key), 0, int(key))
        bad: list[str] = []
        replace = self.is_train and self.on_bad_image == "skip"
        for step in range(min(len(self), self.MOST_REPLACEMENTS) if replace else 1):
            index = (key.index + step) % len(self)
            if index in self.given_up:
                bad.append(f"{self.sample_id(index)}: {self.given_up[index]}")
                continue
            self.places.enter(index)
            try:
                picture, target = self.source.read(index)
                image = self._decode(picture)
            except (BadPictureError, OSError) as error:
                bad.append(f"{self.sample_id(index)}: {error}")
                continue
            finally:
                self.places.enter(-1)
            return Sample(self._transform(image, key), target, index, key.epoch, key.position, bad)
        return Sample(None, -1, key.index, key.epoch, key.position, bad)

    def _decode(self, picture: Any) -> Any:
        on_batches = isinstance(self.transform, BatchAugment)
        return decode_tensor(picture) if on_batches else decode(picture)

    def plan(self, epoch: int, positions: np.ndarray) -> Plan | None:
        """What is left to do with a batch of these pictures; None: at most to normalise them."""
        if isinstance(self.transform, BatchAugment):
            return self.transform.plan(epoch, positions)
        return None

    def _transform(self, image: Any, key: SampleKey) -> torch.Tensor:
        if isinstance(self.transform, BatchAugment):
            return self.transform.crop(image, key.epoch, key.position)
        unerased = getattr(self.transform, "resplit", False) and key.position % NUM_REPEATS == 0
        with _host_generators(derive_seed(self.seed, "sample", key.epoch, key.position)):
            return self.transform(image, erase=False) if unerased else self.transform(image)


def build_dataset(
    is_train: bool,
    data: "DataOptions",
    transform: Callable[..., torch.Tensor] | None,
    *,
    seed: int,
    classes: list[str] | None = None,
) -> ImageDataset:
    """The training or validation part of ``data.data_set``. Classes are those of the training part.

    With ``classes``, those of a trained model, a validation part may stand alone.

    Raises OptionError for what the options ask in vain, DataError for what is wrong with the files.
    """
    prefix, slash, name = data.data_set.partition("/")
    known = data.data_set.upper()
    if slash and prefix.lower() in _READERS:
        source = _READERS[prefix.lower()](name, is_train, data)
    elif known in _REGISTRY:
        source = None
        if classes is not None and known in _ALONE:
            source = _ALONE[known](data, list(classes))
        if source is None:
            source = _REGISTRY[known](is_train, data, seed)
    else:
        raise _unknown_data_set(data.data_set)
    if not len(source):
        raise DataError(
            f"{data.data_set}: the {'training' if is_train else 'validation'} part is empty"
        )
    return ImageDataset(
        source, transform, seed=seed, is_train=is_train, on_bad_image=data.on_bad_image
    )


def _unknown_data_set(name: str) -> OptionError:
    known = [*_REGISTRY, *(f"{prefix}/NAME" for prefix in _READERS)]
    close = difflib.get_close_matches(name.upper(), list(_REGISTRY), n=1)
    hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}"
    return OptionError("data_set", f"unknown data set {name!r}; {hint}")


def build_transform(
    is_train: bool, preprocessing: Preprocessing, augment: "AugmentOptions"
) -> Callable[..., torch.Tensor]:
    """RGB PIL picture -> (3, S, S) float32: augmented for training, else the centre crop."""
    return TrainTransform(preprocessing, augment) if is_train else EvalTransform(preprocessing)


_NORMALIZATION = {
    "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "MNIST": ((0.1307,) * 3, (0.3081,) * 3),
    "FMNIST": ((0.2860,) * 3, (0.3530,) * 3),
    "DIGITS": ((0.3053,) * 3, (0.3759,) * 3),
}


def default_normalization(data_set: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, deviation) of the training pictures of a small set, three values each; else None."""
    name = data_set.upper()
    return _NORMALIZATION.get("CIFAR100" if name == "CIFAR" else name)


def summarise_classes(dataset: ImageDataset) -> tuple[np.ndarray, list[str]]:
    """Pictures a class, (C,) int64, and lines to log; a line that warns starts with "warning:"."""
    if dataset.targets is None:
        return np.zeros(0, dtype=np.int64), ["pictures a class: unknown before they are read"]
    counts = np.bincount(dataset.targets, minlength=len(dataset.classes))
    least, most = counts.argmin(), counts.argmax()
    if len(counts) <= FEW_CLASSES:
        each = zip(dataset.classes, counts, strict=True)
        lines = ["pictures a class: " + ", ".join(f"{name} {count}" for name, count in each)]
    else:
        lines = [
            f"pictures a class: {counts[least]} ({dataset.classes[least]}) to {counts[most]} "
            f"({dataset.classes[most]})"
        ]
    empty = [dataset.classes[i] for i in np.flatnonzero(counts == 0)]
    if empty:
        lines.append(f"warning: no pictures of {len(empty)} classes: {_list(empty)}")
    present = counts[counts > 0]
    if present.max() >= IMBALANCE * present.min():
        lines.append(
            f"warning: the most frequent class has {present.max() / present.min():.0f} times the "
            "pictures of the least frequent: see --sampler balanced and --class-weights balanced"
        )
    return counts, lines


# --- loaders ------------------------------------------------------------------------------------


def collate(
    samples: list[Sample],
    plan: Callable[[int, np.ndarray], Plan | None] = lambda epoch, positions: None,
) -> Batch:
    """The readable samples as a batch, with the names of the unreadable ones, and their plan."""
    good = [sample for sample in samples if sample.image is not None]
    columns = ([s.target for s in good], [s.index for s in good], [s.position for s in good])
    return Batch(
        torch.stack([s.image for s in good]) if good else torch.empty(0, 3, 0, 0),
        *(torch.tensor(column, dtype=torch.int64) for column in columns),
        [line for sample in samples for line in sample.bad],
        plan(good[0].epoch, np.array(columns[2])) if good else None,
    )


class Loader:
    """Batches of a data set; ``len`` is the number of batches to come.

    A loader process that dies, or that a picture holds for more than ``timeout`` seconds, is named.
    With ``on_bad_image`` "skip" the loaders are started anew behind the last batch that came, and
    the picture counts as unreadable: at once if it took too long, if its loader died on its second
    try. What is random is a function of a picture's place, so the batches are the same as ever.
    """

    MOST_LOSSES = 5  # without a batch in between

    def __init__(
        self,
        dataset: ImageDataset,
        sampler: Sampler,
        *,
        batch_size: int,
        num_workers: int,
        pin_memory: bool,
        drop_last: bool,
        seed: int,
        timeout: float,
    ) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.num_workers = num_workers
        self.timeout = timeout if num_workers else 0
        self._batches = _Rest(sampler, batch_size, drop_last)
        self._died: dict[int, int] = {}  # loader processes that died over a picture
        self._make = functools.partial(
            DataLoader,
            dataset,
            batch_sampler=self._batches,
            num_workers=num_workers,
            collate_fn=functools.partial(collate, plan=dataset.plan),
            pin_memory=pin_memory and torch.cuda.is_available(),
            timeout=self.timeout,
            worker_init_fn=_init_worker,
            prefetch_factor=PREFETCH if num_workers else None,
            persistent_workers=num_workers > 0,
            # Its own, so that starting a pass draws nothing from the global one.
            generator=torch.Generator().manual_seed(seed),
        )
        dataset.places = Places(num_workers)
        self.loader = self._make()

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        done = losses = 0
        batches = self._start(done)
        while True:
            try:
                batch = next(batches, None)
            except (RuntimeError, OSError, EOFError) as error:
                # A batch of a process that died in handing it over fails with a broken connection.
                losses += 1
                self._lost(error, losses)
                del batches
                batches = self._start(done)
                continue
            if batch is None:
                return
            done, losses = done + 1, 0
            unusable = self.dataset.is_train and not len(batch.targets)
            if batch.bad and (self.dataset.on_bad_image == "error" or unusable):
                raise DataError(
                    f"{batch.bad[0]} (mend or remove the file"
                    + (")" if unusable else ", or add --on-bad-image skip)")
                )
            yield batch

    def _start(self, done: int) -> Iterator[Batch]:
        """The batches of this pass after the first ``done``."""
        self._batches.skip = done
        # Otherwise torch raises wherever the main process is at the moment when a loader dies.
        before = signal.getsignal(signal.SIGCHLD)
        batches = iter(self.loader)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        self._batches.skip = 0
        return batches

    def _lost(self, error: Exception, losses: int) -> None:
        """Make ready for new loader processes, or raise what a person should know."""
        slow, places = "DataLoader timed out" in str(error), self.dataset.places
        if not slow and not places.some_died():
            if "shared memory" in str(error) or "No space left" in str(error):
                raise DataError(f"{_NO_MEMORY} ({str(error).splitlines()[0]})") from None
            raise error
        held = places.slower_than(0.9 * self.timeout) if slow else places.of_the_dead()
        names = [self.dataset.sample_id(i) for i in held]
        if slow:
            reason = f"not read within {self.timeout:g} s"
            if not held:
                raise DataError(
                    f"no batch came within {self.timeout:g} s, though no picture hangs: is the "
                    "storage slow? Raise --loader-timeout, or lower --num-workers"
                )
        else:
            reason = "a loader process died over it"
        skip = self.dataset.on_bad_image == "skip"
        if not skip or losses > self.MOST_LOSSES:
            what = f"{', '.join(names)}: {reason}" if names else "a loader process died"
            hint = "" if slow else f"; if it was killed, {_NO_MEMORY}"
            more = "" if skip else ", or add --on-bad-image skip"
            raise DataError(f"{what} (mend or remove the file{more}{hint})") from None
        for index in held:
            self._died[index] = self._died.get(index, 0) + 1
            if slow or self._died[index] > 1:
                self.dataset.given_up[index] = reason
        logger.warning(
            "%s%s; the loaders are started anew",
            reason, f": {', '.join(names)}" if names else " (a loader process was lost)",
        )  # fmt: skip
        places.kill()
        self.loader = self._make()


_NO_MEMORY = (
    "memory or shared memory (/dev/shm) ran out: lower --num-workers or --batch-size, or give a "
    "container --shm-size=8g"
)


class _Rest(Sampler[list[SampleKey]]):
    """The sampler's batches after the first ``skip``."""

    def __init__(self, sampler: Sampler, batch_size: int, drop_last: bool) -> None:
        self.batches = BatchSampler(sampler, batch_size, drop_last)
        self.skip = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return itertools.islice(iter(self.batches), self.skip, None)


class Places:
    """Which picture each loader process is at, in memory that they share with the main process."""

    def __init__(self, num_workers: int) -> None:
        # A row a process: its number, the picture's index or -1, since when.
        self._rows = torch.zeros(num_workers, 3, dtype=torch.float64).share_memory_()

    def enter(self, index: int) -> None:
        """This loader process begins with a picture; -1: it has done."""
        info = get_worker_info()
        if info is not None:
            values = (os.getpid(), index, time.monotonic())
            self._rows[info.id] = torch.tensor(values, dtype=torch.float64)

    def _all(self) -> list[tuple[int, int, float]]:
        rows = self._rows.tolist()
        return [(int(pid), int(index), since) for pid, index, since in rows if pid]

    def slower_than(self, seconds: float) -> list[int]:
        """Pictures that loader processes have been at for longer."""
        now = time.monotonic()
        return [i for _, i, since in self._all() if i >= 0 and now - since > seconds]

    def some_died(self) -> bool:
        """Whether a loader process is gone."""
        return any(not process_runs(pid) for pid, _, _ in self._all())

    def of_the_dead(self) -> list[int]:
        """Pictures over which loader processes died."""
        return [i for pid, i, _ in self._all() if i >= 0 and not process_runs(pid)]

    def kill(self) -> None:
        """End all loader processes, also one that hangs in the operating system."""
        for pid, _, _ in self._all():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._rows.zero_()


def _init_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C and SLURM's warnings go to every process; the main one decides what they mean.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # So does SIGTERM, but with that the main process ends its workers as well: obey it alone.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told_by_parent, daemon=True).start()


def _end_when_told_by_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def build_loader(
    dataset: ImageDataset,
    sampler: Sampler,
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    drop_last: bool,
    seed: int,
    timeout: float = 0,
) -> Loader:
    """Batches of a data set in the sampler's order; the same ones for every ``num_workers``.

    The sampler may change its epoch between passes. ``timeout``: seconds to wait for a batch.
    """
    if drop_last and len(sampler) < batch_size:
        raise OptionError(
            "batch_size", f"{batch_size} is more than the {len(sampler)} pictures of a process"
        )
    return Loader(
        dataset,
        sampler,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=drop_last,
        seed=seed,
        timeout=timeout,
    )


def cores() -> int:
    """Processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def auto_num_workers(local_world_size: int) -> int:
    """One loader process a core and training process of this machine, at most 10."""
    return min(10, cores() // local_world_size)


def most_workers(batch_bytes: int, local_world_size: int, shm: str = "/dev/shm") -> int | None:
    """Loader processes whose batches fit the shared memory that is free; None: it isn't known.

    Each has PREFETCH batches there of training and as many (of 1.5 times the size) of evaluation,
    one more is being handed over.
    """
    try:
        free = shutil.disk_usage(shm).free
    except OSError:
        return None
    return max(0, int(free / local_world_size / (batch_bytes * 2.5) - 1) // PREFETCH)
