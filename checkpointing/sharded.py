"""The sharded format: a folder that all processes write and any number of them can read.

``rest.pth`` holds all that isn't sharded, with a skeleton entry for each tensor that is, and the
checksum of each file; ``.metadata`` and ``__RANK_N.distcp`` are those of
``torch.distributed.checkpoint``. ``writer.py`` writes such folders.
"""

import os
import pickle
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
from errors import CheckpointError, first_line

REST = "rest.pth"
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
    problem = None
    files = sorted(rest.pop("files").items())
    for name, expected in files[rank::world]:
        path = folder / Path(name).name
        if not path.is_file():
            problem = f"{path.name} is missing"
        elif checksum(path) != expected:
            problem = f"{path.name} is damaged"
    problems = gather(problem) if scattered else [problem]
    problem = next((p for p in problems if p), None)
    if problem:
        raise CheckpointError(f"checkpoint {folder} can't be read: {problem}")
    tensors: dict[str, Tensor] = {}
    mesh = init_device_mesh("cpu", (world,)) if scattered else None

    def make_empty(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if mesh is None:
            tensors[name] = torch.empty(shape, dtype=dtype)
        else:
            tensors[name] = empty_sharded(
                *shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)]
            )
        return tensors[name]

    content = _join(rest, make_empty)
    try:
        # Without exchanges: every process finds its parts in the files by itself.
        dcp.load(tensors, storage_reader=_Reader(folder), no_dist=True)
    except (CheckpointException, OSError, RuntimeError) as error:
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"checkpoint {folder} can't be read: {first_line(error)}") from None
    return content


_METADATA = {
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
        if name not in _METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"its metadata holds {module}.{name}; refused")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """torch's reader, which would run any code that the metadata's pickle names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("its metadata is of another kind")
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
