"""The names of millions of images in one block of memory."""

import os
from array import array
from collections.abc import Sequence

import numpy as np


class Names(Sequence[bytes]):
    """Many names, one after the other in one array.

    A list would be copied to every worker as its reference counts change, and an array of texts
    gives each the room of the longest. Both arrays may lie in memory that processes share.
    """

    def __init__(self, names: Sequence[bytes]) -> None:
        self._set(b"".join(names), np.fromiter(map(len, names), np.int64, len(names)))

    def _set(self, block: bytes | bytearray, lengths: np.ndarray) -> None:
        self._block = np.frombuffer(block, np.uint8)
        self._begins = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=self._begins[1:])

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __getitem__(self, index: int) -> bytes:
        if index < 0:
            raise IndexError(index)
        return self._block[self._begins[index] : self._begins[index + 1]].tobytes()

    def chosen(self, indices: np.ndarray) -> list[bytes]:
        """The names of ``indices``, faster than one by one."""
        block, begins = self._block.data, self._begins[indices].tolist()
        ends = self._begins[indices + 1].tolist()
        return [bytes(block[begin:end]) for begin, end in zip(begins, ends, strict=True)]

    def run(self, start: int, stop: int) -> bytes:
        """The names from ``start`` up to ``stop`` and their lengths, for a digest."""
        begins = self._begins[start : stop + 1]
        return self._block[begins[0] : begins[-1]].tobytes() + np.diff(begins).tobytes()


class NamesByFolder:
    """Collects the paths of files, folder by folder, with no object that stays for each."""

    def __init__(self) -> None:
        self._block = bytearray()
        self._lengths = array("q")

    def add(self, folder: str, files: Sequence[str]) -> None:
        """Add the paths ``folder/FILE``."""
        if not files:
            return
        before = os.path.join(folder, "")
        text = before + before.join(files)
        if text.isascii():
            self._block += text.encode("ascii")
            self._lengths.extend(map(len(before).__add__, map(len, files)))
            return
        for file in files:
            name = os.fsencode(before + file)
            self._block += name
            self._lengths.append(len(name))

    def names(self) -> Names:
        """All that were added."""
        names = Names.__new__(Names)
        names._set(self._block, np.frombuffer(self._lengths, np.int64))
        return names
