"""The checksum of a whole file, which lies in the file itself.

A checkpoint is what ``torch.save`` writes, a zip archive, with ``sha256:HEX`` as the comment of the
archive: the digest of all bytes before the comment's length. A safetensors file has the digest in
its header under ``sha256``, of all bytes with zeros in the digest's place. To readers of such files
neither means anything.
"""

import hashlib
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from errors import CheckpointError

_END_SIZE = 22  # bytes of a zip's end record, whose last two are the length of the comment after it
_COMMENT_SIZE = 71
_SEALED_END = re.compile(rb"PK\x05\x06.{16}\x47\0sha256:([0-9a-f]{64})", re.DOTALL)
_BLOCK = 1 << 22  # bytes that are read at a time
_IN_HEADER = "sha256"
_HEADER_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_NO_DIGEST = "0" * 64
# A file changed since it was looked at may have the same time, if that was within this.
_CLOCK_TICK = 2_000_000_000  # nanoseconds
_verified: set[tuple[int, ...]] = set()


class SealedFile:
    """What ``torch.save`` writes an archive to, from its begin to its end; :meth:`seal` adds the
    checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._last = b""  # held back: in the end, the end record

    def write(self, data: Any) -> int:
        """Append ``data``. Raises OSError."""
        view = memoryview(data).cast("B")
        held = self._last + bytes(view[-_END_SIZE:])
        # Of a large block no copy is made.
        parts = (self._last, view[:-_END_SIZE]) if len(view) >= _END_SIZE else (held[:-_END_SIZE],)
        for part in parts:
            self._digest.update(part)
            self._file.write(part)
        self._last = held[-_END_SIZE:]
        return len(view)

    def flush(self) -> None:
        """Hand what is complete to the system."""
        self._file.flush()

    def seal(self) -> None:
        """Append the checksum, after all of the archive is written. Raises OSError."""
        record = self._last[:-2]
        self._digest.update(record)
        comment = f"sha256:{self._digest.hexdigest()}".encode("ascii")
        self._file.write(record + len(comment).to_bytes(2, "little") + comment)


def is_verified(path: Path) -> bool:
    """Whether the archive ``path`` carries a checksum, which is right.

    All of the file is read, once for all as long as it doesn't change. Raises CheckpointError if
    the bytes are not those that the checksum is of, OSError.
    """
    with open(path, "rb") as file:
        facts = os.fstat(file.fileno())
        whole = facts.st_size - _COMMENT_SIZE - 2
        file.seek(max(0, whole - _END_SIZE + 2))
        sealed = _SEALED_END.fullmatch(file.read(_END_SIZE + _COMMENT_SIZE))
        if not sealed:
            return False
        state = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
        if state in _verified:
            return True
        file.seek(0)
        if _digest_of(file, whole) != sealed[1].decode("ascii"):
            raise CheckpointError(
                f"checkpoint {path} is damaged: its bytes are not those that its checksum is of"
            )
    if time.time_ns() - max(facts.st_mtime_ns, facts.st_ctime_ns) > _CLOCK_TICK:
        _verified.add(state)
    return True


def _digest_of(file: BinaryIO, size: int) -> str:
    """The digest of the next ``size`` bytes."""
    digest = hashlib.sha256()
    while size > 0 and (block := file.read(min(size, _BLOCK))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


# --- safetensors ----------------------------------------------------------------------------------


def save_safetensors(
    path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write ``weights`` as safetensors, with ``metadata`` and the checksum in the header.

    Raises SafetensorError or OSError where the file system refuses.
    """
    from safetensors.torch import save_file

    save_file(dict(weights), path, metadata={**metadata, _IN_HEADER: _NO_DIGEST})
    with open(path, "r+b") as file:
        place, _ = _header_digest(file, path)
        file.seek(0)
        digest = _digest_of(file, path.stat().st_size)
        file.seek(place)
        file.write(digest.encode("ascii"))


def check_safetensors(path: Path) -> None:
    """Raise CheckpointError where a safetensors file has a checksum, and it is another one."""
    with open(path, "rb") as file:
        place, expected = _header_digest(file, path)
        if not expected:
            return
        digest = hashlib.sha256()
        file.seek(0)
        digest.update(file.read(place))
        file.seek(len(expected), os.SEEK_CUR)
        digest.update(_NO_DIGEST.encode("ascii"))
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise CheckpointError(
            f"checkpoint {path} is damaged: its bytes are not those that its checksum is of"
        )


HEADER_LIMIT = 100_000_000  # bytes, the format's own
"""What a safetensors header may have."""


def _header_digest(file: BinaryIO, path: Path) -> tuple[int, str]:
    """Where the checksum in a safetensors header is, and the checksum; ``""`` where there is none.

    Raises CheckpointError for a header that is longer than the file or the format's limit.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > min(HEADER_LIMIT, path.stat().st_size - 8):
        raise CheckpointError(
            f"checkpoint {path} is cut off or damaged: its header has {length} bytes"
        )
    header = file.read(length)
    found = _HEADER_DIGEST.search(header)
    return (8 + found.start(1), found[1].decode("ascii")) if found else (0, "")
