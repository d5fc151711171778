"""Pack a data set into shards: tar files in webdataset's form, read by --data-set wds/NAME.

    python -m tools.data pack --data-path pets --output-dir pets-shards --short-side 256
    python main.py --data-set wds/pets --data-path pets-shards --model deit_small

Takes every data set that training does. Image files go in as they are; with --short-side larger
ones are made smaller. Beside each shard lies its index, so that training starts at once. The folder
appears when all is written.

    python -m tools.data pack --data-path pets --output-dir pets-raw --format raw
    python main.py --data-set raw/pets --data-path pets-raw --model deit_small

decodes the images once for all: their pixels lie in one file for each part.
"""

import argparse
import contextlib
import errno
import functools
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from augmentation.bands import resized_bands
from augmentation.protocol import RGB, Form
from augmentation.windows import Size
from checkpointing.files import MULTILABEL
from config import Config
from errors import DataError, UserError
from outputs.console import say
from pipeline.bands import decode_bands
from pipeline.dataset import ImageDataset, findings
from pipeline.decoding import BadImageError, decode
from pipeline.formats import EXTENSIONS
from pipeline.kept_pixels import rows_of
from pipeline.sources.base import Target
from pipeline.sources.labels import Labels
from pipeline.sources.shard_index import SEVERAL, Place, ShardIndex
from tools.common import command, reading
from tools.data.raw import SIDE, Raw, RawImage, RawWriter

SPLITS = {"train": "train", "val": "validation"}  # timm's name of each part
SHARD_MIB = 256
QUALITY = 95  # of JPEG files that are made


class Packed(NamedTuple):
    """An image file as it goes into a shard, or why it doesn't."""

    content: bytes
    extension: str
    label: Target
    """Number of the class, or which classes it has, (K,)."""
    key: str
    problem: str = ""


def pack_image(
    dataset: ImageDataset,
    index: int,
    side: int | None,
    quality: int,
    background: str,
    form: Form = RGB,
) -> Packed:
    """Read an image; larger than ``side``, pixels or not, make a new file of it.

    New files are PNG, or JPEG of ``quality`` where they are smaller; of another ``form`` than RGB
    NPY. What is transparent is on ``background`` in them.
    """
    key = f"{index:09d}"
    try:
        encoded, label = dataset.source.read(index)
        content = reading.file_of(encoded)
        if form != RGB:
            bands = decode_bands(encoded if content is None else content, form, background)
            if content is None or (side is not None and min(bands.shape[1:]) > side):
                return Packed(_npy(_shrunk(bands, side), form), "npy", label, key)
            return Packed(content, _extension(encoded, "TIFF"), label, key)
        if content is None:
            image = decode(encoded, background)
            if side is None or min(image.size) <= side:
                return Packed(_encode(image, "PNG"), "png", label, key)
            return Packed(_encode(_shrink(image, side), "JPEG", quality), "jpg", label, key)
        kind, _, size = reading.kind_of(content)
        if side is not None and min(size) > side:
            image = _shrink(decode(io.BytesIO(content), background), side)
            return Packed(_encode(image, "JPEG", quality), "jpg", label, key)
        return Packed(content, _extension(encoded, kind), label, key)
    except (BadImageError, OSError) as error:
        return Packed(b"", "", -1, key, f"{dataset.sample_id(index)}: {error}")


def _extension(image: Any, form: str) -> str:
    """The suffix by which a member is known as an image."""
    own = os.path.splitext(image)[1].lower() if isinstance(image, str) else ""
    if own in EXTENSIONS:
        return own[1:]
    usual = {"JPEG": ".jpg", "JPEG2000": ".jp2", "MPO": ".jpg"}.get(form, f".{form.lower()}")
    if usual not in EXTENSIONS:
        raise BadImageError(f"{form} files are not read from shards")
    return usual[1:]


def _shrink(image: Image.Image, side: int) -> Image.Image:
    return image.resize(_smaller(image.size, side), Image.Resampling.BICUBIC)


def _smaller(size: Size, side: int) -> Size:
    """``size`` in its proportions with a short side of ``side``."""
    factor = side / min(size)
    width, height = (max(side, round(length * factor)) for length in size)
    return width, height


def _shrunk(bands: Tensor, side: int | None) -> Tensor:
    """(C, H, W) with a short side of ``side`` at most."""
    height, width = bands.shape[1:]
    if side is None or min(height, width) <= side:
        return bands
    return resized_bands(bands, _smaller((width, height), side))


def _npy(bands: Tensor, form: Form) -> bytes:
    """A file of bands (C, H, W). Raises BadImageError where it wouldn't say which axis they are."""
    if form.channels == 1:
        pixels = bands[0].numpy()
    else:
        like_bands = bands.shape[1] == form.channels  # rows that are first would be taken for them
        pixels = bands.numpy() if like_bands else rows_of(bands)
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    decode_bands(buffer, form)
    return buffer.getvalue()


def _encode(image: Image.Image, form: str, quality: int = QUALITY) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": quality} if form == "JPEG" else {}))
    return buffer.getvalue()


class ShardWriter:
    """Writes samples into shards of about ``limit`` bytes, each with its index.

    With the names of ``classes`` samples have any number of labels, by name in a ``.json``.
    """

    def __init__(
        self, folder: Path, part: str, limit: float, classes: Sequence[str] | None = None
    ) -> None:
        self.classes = classes
        self.folder = folder
        self.part = part
        self.limit = limit
        self.shards: list[Path] = []
        self.lengths: list[int] = []
        self._tar: tarfile.TarFile | None = None

    @property
    def done(self) -> int:
        """Images in whole shards."""
        return sum(self.lengths)

    def add(self, packed: Packed) -> None:
        """Append a sample, to a new shard if it is the first or the last one is full."""
        if self._tar is not None and self._tar.offset + len(packed.content) > self.limit:
            self.close()
        if self._tar is None:
            path = self.folder / f"{self.part}-{len(self.shards):06d}.tar"
            self._tar = tarfile.TarFile(path, "w", format=tarfile.USTAR_FORMAT)
            self._rows: list[Place] = []
            self._labels: list[Labels] = []
            self.shards.append(path)
        offset = self._member(f"{packed.key}.{packed.extension}", packed.content)
        label = SEVERAL if self.classes else packed.label
        self._rows.append((offset, len(packed.content), label, packed.key))
        if self.classes:
            names = tuple(self.classes[k] for k in np.flatnonzero(packed.label))
            self._labels.append(names)
            self._member(f"{packed.key}.json", json.dumps({"labels": names}).encode())
        else:
            self._member(f"{packed.key}.cls", str(packed.label).encode())

    def _member(self, name: str, content: bytes) -> int:
        """Append a file; returns where its content begins."""
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._tar.addfile(info, io.BytesIO(content))
        self._tar.members = []  # or tarfile keeps them all
        blocks = -(-len(content) // tarfile.BLOCKSIZE)
        return self._tar.offset - blocks * tarfile.BLOCKSIZE

    def close(self) -> None:
        """Finish the shard under way."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None
            shard = self.shards[-1]
            index = ShardIndex.of(self._rows, shard.stat().st_size)
            index.write(shard, self._labels if self.classes else None)
            self.lengths.append(len(self._rows))

    def abandon(self) -> None:
        """Close the file under way, whole or not."""
        if self._tar is not None:
            with contextlib.suppress(OSError):
                self._tar.fileobj.close()

    def info(self) -> dict[str, Any]:
        """The part's entry in ``_info.json``, as timm and webdataset's users know it."""
        return {
            "name": SPLITS[self.part],
            "num_samples": self.done,
            "filenames": [path.name for path in self.shards],
            "shard_lengths": self.lengths,
        }

    def summary(self, folder: Path) -> str:
        """What was written, in words; it lies in ``folder`` by now."""
        size = sum((folder / path.name).stat().st_size for path in self.shards)
        return (
            f"{self.part}: {self.done} images in {len(self.shards)} shards, {size / 2**20:.1f} MiB"
        )


@dataclass(frozen=True)
class Shards:
    """Image files in tar files."""

    size: float
    """Bytes of a shard."""
    side: int | None
    """Pixels that larger images keep of their short side; None: all."""
    quality: int
    """Of the JPEG files that are made of them."""
    background: str
    """What transparent ones among those are composited on."""
    form: Form = RGB
    """Of the images."""

    data_set = "wds"

    def check(self, parts: Mapping[str, ImageDataset], folder: Path) -> None:
        """How large files will be isn't known before they are made."""

    def writer(self, folder: Path, part: str, dataset: ImageDataset) -> ShardWriter:
        several = dataset.targets is not None and dataset.targets.ndim == 2
        return ShardWriter(folder, part, self.size, dataset.classes if several else None)

    def read(self, dataset: ImageDataset, index: int) -> Packed:
        return pack_image(dataset, index, self.side, self.quality, self.background, self.form)

    def write_list(
        self, folder: Path, writers: Sequence[ShardWriter], classes: Sequence[str]
    ) -> None:
        """The list of the shards."""
        splits = {SPLITS[writer.part]: writer.info() for writer in writers}
        info = {"splits": splits, "classes": list(classes)}
        (folder / "_info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")


Writer = ShardWriter | RawWriter


def write_part(writer: Writer, packed: Iterator[Packed | RawImage], on_bad_image: str) -> list[str]:
    """Write all of a part; returns the images that were left out.

    Raises DataError at the first such image, unless ``on_bad_image`` is skip.
    """
    bad = []
    for sample in packed:
        if sample.problem and on_bad_image == "error":
            raise DataError(
                f"{sample.problem} (repair or remove the file, or add --on-bad-image skip)"
            )
        if sample.problem:
            bad.append(sample.problem)
        else:
            writer.add(sample)
    writer.close()
    if not writer.done:
        raise DataError(f"no image of the {writer.part} part could be read")
    return bad


def pack(config: Config, folder: Path, form: Shards | Raw) -> None:
    """Write ``config``'s data set to ``folder``, which appears when it is whole."""
    reading.new_folder(folder)
    parts = reading.parts(config)
    for text in findings(*parts.values()):
        say(f"warning: {text}")
    form.check(parts, folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"{partial} is there: another pack is at work, or was killed; then remove it"
        ) from None
    except OSError as error:
        raise command.not_written(folder, error) from None
    writers: list[Writer] = []
    try:
        for name, dataset in parts.items():
            writers.append(form.writer(partial, name, dataset))
            work = functools.partial(form.read, dataset)
            packed = reading.in_threads(work, range(len(dataset)), f"pack {name}")
            for line in write_part(writers[-1], packed, config.data.on_bad_image):
                say(f"left out: {line}")
        form.write_list(partial, writers, parts["train"].classes)
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise UserError(_what_helps(error, partial, writers)) from None
    finally:
        for writer in writers:
            writer.abandon()
        shutil.rmtree(partial, ignore_errors=True)
    for writer in writers:
        print(writer.summary(folder))
    data_set = f"{form.data_set}/{folder.name}"
    say(f"next: python main.py {_words(config)}--data-set {data_set} --data-path {folder}")


def _words(config: Config) -> str:
    """The options that training takes for such images, each with a space behind it."""
    words = "--task multilabel " if config.data.task == MULTILABEL else ""
    channels, depth = _form(config)
    words += f"--in-chans {channels} " if channels != RGB.channels else ""
    return words + (f"--bit-depth {depth} " if depth != RGB.bit_depth else "")


def _form(config: Config) -> Form:
    return Form(config.model.in_chans, config.data.bit_depth)


def _what_helps(error: OSError, partial: Path, writers: Sequence[Writer]) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"the images can't be written: {error.strerror or error}"
    size = sum(f.stat().st_size for f in partial.iterdir()) / 2**20
    done = sum(writer.done for writer in writers)
    return (
        f"no space left for the images after {size:.0f} MiB ({done} images done): "
        "free space, choose an --output-dir on another disk, or make the images smaller with "
        "--short-side; what was written is removed"
    )


def _carry_out(arguments: argparse.Namespace) -> None:
    config, side = arguments.config, arguments.short_side
    if not config.run.output_dir:
        raise UserError("--output-dir: say where the images are to go")
    raw = arguments.format == "raw"
    if raw and arguments.shard_size is not None:
        raise UserError("--shard-size: leave it out, as --format raw has no shards")
    kind = _form(config)
    if arguments.quality is not None and (raw or kind != RGB):
        what = "--format raw makes" if raw else "--in-chans and --bit-depth make"
        raise UserError(f"--quality: leave it out, as {what} no JPEG files")
    shard_size = SHARD_MIB if arguments.shard_size is None else arguments.shard_size
    quality = QUALITY if arguments.quality is None else arguments.quality
    if shard_size <= 0:
        raise UserError("--shard-size: must be above 0")
    if side is not None and side < (0 if raw else 1):
        raise UserError(f"--short-side: must be at least {0 if raw else 1}")
    if not 1 <= quality <= 100:
        raise UserError("--quality: must be 1 to 100")
    background = config.data.background
    form: Shards | Raw
    if raw:
        scaled = config.augment.jpeg_scaling == "on"
        form = Raw(SIDE if side is None else side, background, scaled, kind)
    else:
        form = Shards(shard_size * 2**20, side, quality, background, kind)
    with command.stopped_by_signals():
        pack(config, Path(config.run.output_dir).expanduser(), form)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = command.run_parser("data pack", __doc__)
    arguments.add_argument(
        "--format",
        choices=("shards", "raw"),
        default="shards",
        help="image files in tar files, or decoded images (default: shards)",
    )
    arguments.add_argument(
        "--shard-size", type=float, metavar="MIB", help=f"of a shard (default: {SHARD_MIB})"
    )
    arguments.add_argument(
        "--short-side",
        type=int,
        metavar="PIXELS",
        help="make larger images smaller, as JPEG, of bands and 16 bits as NPY "
        f"(raw: {SIDE} by default, 0: as they are)",
    )
    arguments.add_argument(
        "--quality", type=int, help=f"of those JPEG files, 1 to 100 (default: {QUALITY})"
    )
    return command.run(_carry_out, arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
