"""The zip archives that ``torch.save`` writes: whether one without a checksum of the whole is
sound."""

import errno
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

from errors import CheckpointError, printable

DIRECTORY_LIMIT = 64 << 20
"""Bytes that the list of an archive's entries may have, of about 70 for each."""
_FOLDER = 0x10  # MS-DOS's attribute of a folder, from which torch's reader reads nothing
_ENCRYPTED, _SIZES_BEHIND, _UTF8 = 0x1, 0x8, 0x800  # flags of an entry
_LOCAL = b"PK\x03\x04"
_LOCAL_SIZE = 30  # bytes of a local header, without name and extra
_END = b"PK\x05\x06"
_END_SIZE = 22  # bytes of the end record without a comment, which torch.save doesn't write
_END64 = b"PK\x06\x06"
_END64_SIZE = 56
_LOCATOR = b"PK\x06\x07"
_LOCATOR_SIZE = 20
_BLOCK = 1 << 22  # bytes that are read at a time


def check_archive(path: Path, *, tensors: bool = True) -> None:
    """Raise CheckpointError unless the archive is one that ``torch.save`` may have written.

    Compared are the end of the file, the list of entries with the header of each, and the CRC-32 of
    each entry's bytes; without ``tensors`` not of what those hold. Raises OSError where the file
    can't be read.
    """
    try:
        problem = _problem(path, tensors=tensors)
    except Exception as error:  # zipfile raises many types for archives that are none
        if isinstance(error, OSError) and not _is_damage(error):
            raise
        problem = str(error) or type(error).__name__
    if problem:
        raise CheckpointError(f"checkpoint {path} is damaged: {printable(problem)}")


def is_archive(path: Path) -> bool:
    """Whether a file has the end of an archive, sound or not."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def names_in(path: Path) -> list[str]:
    """The names of an archive's entries; none where it is damaged. Raises OSError."""
    try:
        if _directory_size(path) > DIRECTORY_LIMIT:
            return []
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception as error:  # as above
        if isinstance(error, OSError) and not _is_damage(error):
            raise
        return []


def _is_damage(error: OSError) -> bool:
    """Whether an error of the system comes from what is in a file: a place before its begin."""
    return error.errno in (None, errno.EINVAL)


def _problem(path: Path, *, tensors: bool) -> str | None:
    size = _directory_size(path)
    if size > DIRECTORY_LIMIT:
        return f"its list of entries has {size} bytes, over the limit of {DIRECTORY_LIMIT}"
    with zipfile.ZipFile(path) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        problem = _wrong_entries(path, entries, archive.start_dir)
        if problem is not None:
            return problem
        for entry in entries:
            if tensors or "/data/" not in entry.filename:
                with archive.open(entry) as file:
                    # At an entry's end its CRC-32 is compared.
                    while file.read(_BLOCK):
                        pass
    return None


def _directory_size(path: Path) -> int:
    """Bytes of the list of entries, as the file's end has it. Raises BadZipFile."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END_SIZE - _LOCATOR_SIZE))
        *before, end = file.read().rpartition(_END)
        if len(end) != _END_SIZE - len(_END) or end[-2:] != b"\0\0":
            raise zipfile.BadZipFile("its end record is not at its end")
        found = int.from_bytes(end[8:12], "little")
        locator = before[0]
        if len(locator) == _LOCATOR_SIZE and locator.startswith(_LOCATOR):
            file.seek(min(size, int.from_bytes(locator[8:16], "little")))
            record = file.read(_END64_SIZE)
            if not record.startswith(_END64):
                raise zipfile.BadZipFile("the end record for large archives is missing")
            # All ones: it is in this record.
            found = 0 if found == 0xFFFFFFFF else found
            found = max(found, int.from_bytes(record[40:48], "little"))
    return found


def _wrong_entries(path: Path, entries: Sequence[zipfile.ZipInfo], end: int) -> str | None:
    """What is wrong with the entries, in their order in the file, the last before ``end``."""
    names = {entry.filename.casefold() for entry in entries}
    if len(names) != len(entries):
        return "two of its entries have the same name"
    place = 0
    with open(path, "rb") as file:
        for entry in entries:
            name = printable(entry.filename)
            folder = entry.filename.endswith("/") or entry.external_attr & _FOLDER
            if folder and entry.file_size:
                return f"{name} is marked as a folder"
            if entry.flag_bits & _ENCRYPTED:
                return f"{name} is encrypted"
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                return f"{name} is compressed, and torch.save never does that"
            if entry.header_offset < place or (place == 0 != entry.header_offset):
                return f"{name} is not where the entry before it ends"
            file.seek(entry.header_offset)
            header = file.read(_LOCAL_SIZE)
            lengths = [int.from_bytes(header[i : i + 2], "little") for i in (26, 28)]
            if not _agrees(entry, header, file.read(lengths[0])):
                return f"{name} has another header than the list of entries says"
            place = entry.header_offset + _LOCAL_SIZE + sum(lengths) + entry.file_size
    return "its list of entries begins before they end" if place > end else None


def _agrees(entry: zipfile.ZipInfo, header: bytes, name: bytes) -> bool:
    """Whether the header in front of an entry says of it what the list of entries does."""
    flags, method = (int.from_bytes(header[i : i + 2], "little") for i in (6, 8))
    crc, packed, size = (int.from_bytes(header[i : i + 4], "little") for i in (14, 18, 22))
    # Zeros where the sizes come behind the bytes, all ones where they are in the extra field.
    unsaid = (0,) if flags & _SIZES_BEHIND else ()
    encoding = "utf-8" if flags & _UTF8 else "cp437"
    return (
        header.startswith(_LOCAL)
        and (flags, method) == (entry.flag_bits, entry.compress_type)
        and name == entry.orig_filename.encode(encoding, "replace")
        and crc in (entry.CRC, *unsaid)
        and packed in (entry.compress_size, 0xFFFFFFFF, *unsaid)
        and size in (entry.file_size, 0xFFFFFFFF, *unsaid)
    )
