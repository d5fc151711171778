"""The sharded format: a folder that all processes write and any number of them can read.

``rest.pth`` holds all that isn't sharded, with a skeleton entry for each tensor that is, and the
checksum of each other file; ``.metadata`` and ``__RANK_N.distcp`` are those of
``torch.distributed.checkpoint``. ``writer.py`` writes such folders.
"""

import os
import pickle
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import empty as empty_sharded

from distributed.processes import gather
from errors import CheckpointError, first_line, os_error_text, printable

REST = "rest.pth"
METADATA = ".metadata"  # where each part of each tensor is
_SHARD = re.compile(r"__\d+_\d+\.distcp")
_NAME = "sharded tensor"  # key of what stands in a skeleton for a tensor that lies elsewhere


def split(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, DTensor]]:
    """``content`` with a placeholder for each sharded tensor, and these tensors by name."""
    sharded: dict[str, DTensor] = {}
    return _without_sharded(content, "", sharded), sharded


def _without_sharded(value: Any, name: str, sharded: dict[str, DTensor]) -> Any:
    """``value`` with placeholders; the tensors they stand for are added to ``sharded``."""
    if isinstance(value, DTensor):
        sharded[name] = value
        dtype = str(value.dtype).removeprefix("torch.")
        return {_NAME: name, "shape": list(value.shape), "dtype": dtype}
    if isinstance(value, Mapping):
        return {k: _without_sharded(v, f"{name}.{k}", sharded) for k, v in value.items()}
    if isinstance(value, list | tuple):
        parts = (_without_sharded(v, f"{name}.{i}", sharded) for i, v in enumerate(value))
        return type(value)(parts)
    return value


def _join(value: Any, make: Callable[[str, tuple[int, ...], torch.dtype], Tensor]) -> Any:
    """``value`` with ``make(name, shape, type)`` in the place of each placeholder."""
    if isinstance(value, Mapping):
        if _NAME in value:
            return make(value[_NAME], tuple(value["shape"]), getattr(torch, value["dtype"]))
        return {k: _join(v, make) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_join(v, make) for v in value)
    return value


def on_host(value: DTensor, mesh: DeviceMesh) -> DTensor:
    """A copy of ``value`` in host memory."""
    return DTensor.from_local(
        value.to_local().detach().to("cpu", copy=True),
        mesh,
        value.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )


def checksum(path: Path) -> int:
    """CRC-32 of a file, which is on disk when this returns."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
        os.fsync(file.fileno())
    return value


def read_sharded(folder: Path, rest: dict[str, Any], *, scattered: bool = False) -> dict[str, Any]:
    """The content of a sharded checkpoint, in host memory.

    Args:
        folder: the checkpoint.
        rest: the content of its ``rest.pth``.
        scattered: each process reads its own part of the tensors; to be called by all. Otherwise
            this process reads all of them, whole.

    Raises:
        CheckpointError: a file is missing, damaged, or holds something else than tensors.
    """
    rest = dict(rest)
    rank, world = (dist.get_rank(), dist.get_world_size()) if scattered else (0, 1)
    checksums = rest.pop("files", None)
    try:
        problem = _wrong_files(folder, checksums, rank, world)
    except OSError as error:
        problem = os_error_text(error, folder)
    _raise_first(folder, problem, scattered=scattered)
    tensors: dict[str, Tensor] = {}
    mesh = init_device_mesh("cpu", (world,)) if scattered else None
    try:
        metadata = _read_metadata(folder / METADATA)
        _check_places(metadata, checksums)

        def make_empty(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            # Before there is memory for it.
            known = metadata.state_dict_metadata.get(name)
            if getattr(known, "size", None) != torch.Size(shape):
                raise pickle.UnpicklingError(f"its metadata knows no {name} of that shape")
            if mesh is None:
                tensors[name] = torch.empty(shape, dtype=dtype)
            else:
                tensors[name] = empty_sharded(
                    *shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)]
                )
            return tensors[name]

        content = _join(rest, make_empty)
        # Without exchanges: every process finds its parts in the files by itself.
        dcp.load(tensors, storage_reader=_Reader(folder, metadata), no_dist=True)
    except Exception as error:  # torch raises many types for files that aren't as expected
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        problem = printable(first_line(error))
    _raise_first(folder, problem, scattered=scattered)
    return content


def _raise_first(folder: Path, problem: str | None, *, scattered: bool) -> None:
    """Raise CheckpointError if there is a problem; where all processes read, on all of them."""
    problems = gather(problem) if scattered else [problem]
    found = next((p for p in problems if p), None)
    if found:
        raise CheckpointError(f"checkpoint {folder} can't be read: {found}")


def _wrong_files(folder: Path, checksums: Any, rank: int, world: int) -> str | None:
    """What is wrong with this process's share of the files. Raises OSError."""
    if not isinstance(checksums, Mapping) or not all(map(_is_file_name, checksums)):
        return f"its {REST} has no checksums of the other files"
    for name, expected in sorted(checksums.items())[rank::world]:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if checksum(path) != expected:
            return f"{name} is damaged"
    return None


def _is_file_name(name: Any) -> bool:
    return name == METADATA or (isinstance(name, str) and bool(_SHARD.fullmatch(name)))


def _read_metadata(path: Path) -> Metadata:
    """What describes the tensors. Raises UnpicklingError, or whatever else a pickle leads to."""
    with open(path, "rb") as file:
        metadata = _MetadataUnpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError("its metadata is of another kind")
    return metadata


def _check_places(metadata: Metadata, checksums: Mapping[str, int]) -> None:
    """Raise UnpicklingError where a part of a tensor lies in a file that has no checksum."""
    for place in metadata.storage_data.values():
        if str(place.relative_path) not in checksums:
            raise pickle.UnpicklingError(f"its metadata names {place.relative_path!r}; refused")


_ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": (
        "Size",
        "float32",
        "float64",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "bool",
        "device",
    ),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "Path"),
    "pathlib._local": ("PosixPath", "WindowsPath", "PurePosixPath", "Path"),
    "collections": ("OrderedDict",),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Reads what describes tensors and refuses every other object, which might run code."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"its metadata holds {module}.{name}; refused")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """torch's reader, which would run any code that the metadata's pickle names."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = self._metadata
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
