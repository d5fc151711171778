"""One file of decoded images, which many processes read and fill at the same time.

A header says whose images they are, an index has a row for each, the pixels follow in the order in
which they were written. A row is written after its pixels, and both have a checksum: what a killed
process left half done, and what a disk has lost, is seen when it is read.

Everything is read and written with calls that return errors. A mapping of the file would end the
process where the disk fails or is full (SIGBUS), and isn't faster: the checksum reads each image
once from front to back, and the crop is then taken from the processor's cache.
"""

import errno
import os
import struct
import time
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from augmentation.protocol import RGB, Form
from pipeline.arrays import MOST_BANDS

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None

SUFFIX = ".images"
KEY_BYTES = 32
MOST_IMAGES = 1 << 25  # so that the index of a foreign file fills no memory
MOST_IMAGE_BYTES = 1 << 30  # of an image that is kept; larger ones are rare, and slow a crop down
HEADER_BYTES = 4096
_MAGIC, _MAGIC_OF_FORM = b"images1\n", b"images2\n"
_HEADER = struct.Struct(f"<8s{KEY_BYTES}sQ")  # magic, key, number of images
_FORM = struct.Struct("<II")  # behind it, of other images than RGB: channels, bits of each
_ROW = struct.Struct("<QIIiIQ")
_CRC = struct.Struct("<I")
_NUMBER = struct.Struct("<Q")
ROW_BYTES = _ROW.size + _CRC.size
# A link, or a pipe that nobody writes to, is no file of images.
_PLAIN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_PAGE = 4096  # bytes that make a row of the matrix whose sums are taken
START_SECONDS = 10.0  # that another process may be at a file without a header
# Locks of Linux that belong to an open file, not to a process, and that threads don't share.
_SET_LOCK = getattr(fcntl, "F_OFD_SETLK", None)
_SHARED, _EXCLUSIVE, _NONE = (getattr(fcntl, f"F_{kind}LCK", 0) for kind in ("RD", "WR", "UN"))


class Row(NamedTuple):
    """What the index says of an image."""

    offset: int
    """Where its pixels begin; 0 where it isn't there."""
    height: int
    width: int
    label: int
    digest: int
    """:func:`digest` of its pixels."""
    stamp: int
    """Of the file that it was made of, see ``Source.stamp``."""


MISSING = Row(0, 0, 0, 0, 0, 0)


class DamagedError(Exception):
    """The file doesn't hold what was written to it."""


def digest(pixels: np.ndarray) -> int:
    """A checksum of a contiguous array, several times as fast as a CRC of its bytes.

    It is the CRC-32 of the sums, modulo 2⁶⁴, of the rows and of the columns of a matrix of 8-byte
    words. One to three flipped bits always change it, anything else with a chance of 1 − 2⁻³².
    """
    flat = pixels.reshape(-1).view(np.uint8)
    whole = len(flat) // _PAGE * _PAGE
    crc = zlib.crc32(flat[whole:])
    if whole:
        words = flat[:whole].view("<u8").reshape(-1, _PAGE // 8)
        for axis in (0, 1):
            crc = zlib.crc32(np.add.reduce(words, axis), crc)
    return crc


def _kind(form: Form) -> np.dtype:
    """The type of the pixels, as they lie in a file."""
    return np.dtype("<u2" if form.bit_depth == 16 else "u1")


def _lock(file: BinaryIO, kind: int, start: int = 0, length: int = 1) -> bool:
    """Lock some bytes, without waiting; True also where there are no such locks."""
    if _SET_LOCK is None:
        return True
    try:
        fcntl.fcntl(file, _SET_LOCK, struct.pack("hhqqi0q", kind, os.SEEK_SET, start, length, 0))
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def _opened(path: Path, flags: int, mode: str) -> BinaryIO:
    descriptor = os.open(path, flags | os.O_CLOEXEC | _PLAIN, 0o600)
    return open(descriptor, mode, buffering=0)


def _device_and_inode(file: Path | int) -> tuple[int, int] | None:
    """Which file that is; None if there is none."""
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def in_use(path: Path) -> bool:
    """Whether an ``ImageFile`` of any process has the file open. Raises OSError."""
    with _opened(path, os.O_RDWR, "rb+") as file:
        return not _lock(file, _EXCLUSIVE)


class ImageFile:
    """The file at ``path``, of ``count`` images of which any may be there.

    Args:
        path: the file, which is made where there is none.
        key: of KEY_BYTES bytes, by which the file is known as one of these images; None: whatever
            file is there.
        count: images, with a key.
        form: of the images, with a key.

    Attributes:
        writable: whether images can be added.

    Raises:
        OSError: it can't be opened, or made.
        DamagedError: it is another file, or one that another process holds half made.
    """

    def __init__(
        self, path: Path, key: bytes | None = None, count: int = 0, form: Form = RGB
    ) -> None:
        self.path, self.key, self.count, self.form = path, key, count, form
        self.writable = key is not None
        self._process = 0
        self._file: BinaryIO | None = None
        self._end: BinaryIO | None = None
        self._known: tuple[int, int] | None = None  # device and inode
        ends = time.monotonic() + START_SECONDS
        while not self._enter():
            if time.monotonic() > ends:
                raise DamagedError(f"{path} is damaged, or another process holds it: remove it")
            time.sleep(0.01)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_process": 0, "_file": None, "_end": None}

    # --- opening ----------------------------------------------------------------------------------

    def _handles(self) -> BinaryIO:
        """The file as this process has it open: what was forked would share places and locks."""
        if self._process == os.getpid():
            return self._file
        file = None
        if self.writable:
            new = os.O_CREAT if self._known is None else 0
            try:
                file = _opened(self.path, os.O_RDWR | new, "rb+")
            except OSError as error:
                refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
                if not (refused and self.path.exists()):
                    raise
                self.writable = False
        if file is None:
            file = _opened(self.path, os.O_RDONLY, "rb")
        found = _device_and_inode(file.fileno())
        if self._known not in (None, found):
            file.close()
            raise OSError(errno.ENOENT, "another file is in its place", str(self.path))
        self._known = found
        if self.writable:
            self._end = _opened(self.path, os.O_WRONLY | os.O_APPEND, "ab")
        self._file, self._process = file, os.getpid()
        return file

    def _enter(self) -> bool:
        """Open the file and lock it as one that is used; False if another process is at it."""
        file = self._handles()
        if self._has_header():
            mine = _lock(file, _SHARED)
        elif not self.writable:
            raise DamagedError(f"{self.path} is no file of these images: remove it")
        elif mine := _lock(file, _EXCLUSIVE):
            # Nobody has it open, not with images that it had before it was damaged either.
            if not self._has_header():
                self._make()
            _lock(file, _SHARED)
        # Whoever made room may have removed it before it was locked.
        if mine and self._known == _device_and_inode(self.path):
            return True
        self._process, self._known = 0, None
        return False

    def _has_header(self) -> bool:
        content = os.pread(self._handles().fileno(), _HEADER.size + _FORM.size + _CRC.size, 0)
        if len(content) < _HEADER.size + _FORM.size + _CRC.size:
            return False
        magic, key, count = _HEADER.unpack_from(content)
        end, form = _HEADER.size, RGB
        if magic == _MAGIC_OF_FORM:
            form, end = Form(*_FORM.unpack_from(content, end)), end + _FORM.size
        good = magic in (_MAGIC, _MAGIC_OF_FORM) and count < MOST_IMAGES
        good = good and _CRC.unpack_from(content, end)[0] == zlib.crc32(content[:end])
        good = good and 0 < form.channels <= MOST_BANDS and form.bit_depth in (8, 16)
        if self.key is None and good:
            self.key, self.count, self.form = key, count, form
        good = good and (key, count, form) == (self.key, self.count, self.form)
        return good and os.fstat(self._file.fileno()).st_size >= self._begins

    def _make(self) -> None:
        file = self._handles().fileno()
        os.ftruncate(file, 0)
        os.ftruncate(file, self._begins)
        own = self.form != RGB
        header = _HEADER.pack(_MAGIC_OF_FORM if own else _MAGIC, self.key, self.count)
        header += _FORM.pack(*self.form) if own else b""
        os.pwrite(file, header + _CRC.pack(zlib.crc32(header)), 0)

    @property
    def _begins(self) -> int:
        """Where the pixels of the first image are."""
        return HEADER_BYTES + self.count * ROW_BYTES

    # --- reading ----------------------------------------------------------------------------------

    def row(self, number: int) -> tuple[Row, bytes]:
        """What the index says of an image, and the bytes of that; a damaged row says that the image
        isn't there. Raises OSError."""
        place = HEADER_BYTES + number * ROW_BYTES
        found = os.pread(self._handles().fileno(), ROW_BYTES, place)
        if len(found) < ROW_BYTES or self._crc(number, found[: _ROW.size]) != found[_ROW.size :]:
            return MISSING, found
        return Row._make(_ROW.unpack(found[: _ROW.size])), found

    def pixels(self, row: Row) -> np.ndarray:
        """The pixels of an image that is there, uint8 or uint16 (H, W, C).

        Raises OSError, DamagedError.
        """
        if self.form.pixel_bytes * row.height * row.width > MOST_IMAGE_BYTES:
            raise DamagedError(f"{self.path}: an image of {row.width:,}×{row.height:,} pixels")
        pixels = np.empty((row.height, row.width, self.form.channels), dtype=_kind(self.form))
        came = os.preadv(self._handles().fileno(), [pixels], row.offset)
        if came < pixels.nbytes or digest(pixels) != row.digest:
            raise DamagedError(f"{self.path}: an image is damaged")
        return pixels

    def there(self) -> np.ndarray:
        """Which images the index has, (count,) bool. Raises OSError."""
        table = np.zeros(self.count, dtype=[("offset", "<u8"), ("rest", f"V{ROW_BYTES - 8}")])
        os.preadv(self._handles().fileno(), [memoryview(table).cast("B")], HEADER_BYTES)
        return table["offset"] != 0

    def size(self) -> int:
        """Bytes of the file. Raises OSError."""
        return os.fstat(self._handles().fileno()).st_size

    # --- writing ----------------------------------------------------------------------------------

    def write(self, number: int, pixels: np.ndarray, label: int, stamp: int, seen: bytes) -> bool:
        """Add an image; False if another process is at it or has done it.

        Args:
            number: of the image.
            pixels: uint8 or uint16 (H, W, C), as the form says, contiguous.
            label: of the image.
            stamp: of the file that it was made of.
            seen: what :meth:`row` gave for it before.

        Raises OSError: the disk is full, for one.
        """
        place = HEADER_BYTES + number * ROW_BYTES
        file = self._handles()
        if not _lock(file, _EXCLUSIVE, place, ROW_BYTES):
            return False
        try:
            if os.pread(file.fileno(), ROW_BYTES, place) != seen:
                return False
            offset = self._append(pixels)
            row = _ROW.pack(offset, *pixels.shape[:2], label, digest(pixels), stamp)
            os.pwrite(file.fileno(), row + self._crc(number, row), place)
        finally:
            _lock(file, _NONE, place, ROW_BYTES)
        return True

    def _append(self, pixels: np.ndarray) -> int:
        """Write pixels behind all others; returns where they begin."""
        written = self._end.write(memoryview(pixels).cast("B"))
        if written != pixels.nbytes:
            # The rest would come behind what another process has written since.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        return os.lseek(self._end.fileno(), 0, os.SEEK_CUR) - written

    def _crc(self, number: int, row: bytes) -> bytes:
        """The checksum of a row, which no other image's row and no other file's has."""
        return _CRC.pack(zlib.crc32(row + _NUMBER.pack(number) + self.key))

    def sync(self) -> None:
        """Wait until all that was written is on the disk. Raises OSError."""
        os.fsync(self._handles().fileno())
