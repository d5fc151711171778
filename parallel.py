"""A model on several processes: DDP, FSDP2 with its sharded checkpoints, synchronised batch norm.

A sharded checkpoint is a folder. ``tensors that are sharded`` lie in it as files of
``torch.distributed.checkpoint``, written by all processes at once; ``rest.pth`` holds everything
else, with the name, shape and type of each sharded tensor in its place, and the checksums of the
files. Any number of processes can read it, a single one too.
"""

import contextlib
import logging
import os
import pickle
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.nn.functional
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import empty as empty_sharded
from torch.nn.modules.batchnorm import _BatchNorm

import utils
from errors import CheckpointError

log = logging.getLogger(__name__)

REST = "rest.pth"
_PLACE = "sharded tensor"  # key of what stands in a skeleton for a tensor that lies elsewhere

# --- the model ------------------------------------------------------------------------------------


def replicate(model: nn.Module, device: torch.device, *, static: bool = False) -> nn.Module:
    """``model`` inside DDP: whole on every process, gradients averaged.

    ``static``: every step uses the same parameters and exchanges gradients, which DDP then needs
    not find out anew; it can't be told so where steps are accumulated.
    """
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        model, ids, gradient_as_bucket_view=True, static_graph=static
    )


def shard(model: nn.Module, device: torch.device, amp: torch.dtype | None) -> None:
    """Spread the parameters of ``model`` over all processes, in place (FSDP2).

    Each block is gathered for its forward and backward pass and let go again. With ``amp`` weights
    travel and are used in that type; gradients are summed in float32. A model may lie in host
    memory before: its blocks move to ``device`` one by one.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Batch norm mixes its weights with statistics, which are float32.
    mixed = amp is not None and not any(isinstance(m, _BatchNorm) for m in model.modules())
    policy = MixedPrecisionPolicy(
        param_dtype=amp if mixed else None,
        reduce_dtype=torch.float32,
        # Autocast decides what is computed in which type, as without sharding.
        cast_forward_inputs=False,
    )
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the model's lists and sequences: transformer blocks, residual blocks."""
    containers = [
        m for m in (model, *model.children()) if isinstance(m, nn.ModuleList | nn.Sequential)
    ]
    members = [m for container in containers for m in container.children()]
    return [m for m in members if m not in containers and any(True for _ in m.parameters())]


@contextlib.contextmanager
def no_sync(net: nn.Module) -> Iterator[None]:
    """Leave gradients on their process: more batches of the same update are to come."""
    if isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            net.set_requires_gradient_sync(True)
    else:
        with net.no_sync() if hasattr(net, "no_sync") else contextlib.nullcontext():
            yield


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass of ``model`` needs all processes."""
    return isinstance(model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """This process's part of ``tensor``, sharing its memory; all of it unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``; to be called by all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_on_main(weights: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """All of ``weights`` in the main process's host memory; to be called by all processes."""
    if weights is None:
        return None
    gathered = {}
    for name, tensor in weights.items():
        full = whole(tensor)
        # One tensor at a time, so that no device holds the whole model.
        gathered[name] = full.to("cpu", copy=True) if dist.get_rank() == 0 else torch.empty(0)
    return gathered


def like(value: Any, target: Tensor) -> Any:
    """``value`` laid out over the processes as ``target`` is, if it is a tensor of that shape."""
    if not isinstance(target, DTensor) or not isinstance(value, Tensor):
        return value
    if value.shape != target.shape:
        return value
    part = local(value)
    if not isinstance(value, DTensor):
        mesh = target.device_mesh
        chunks = part.chunk(mesh.size(), 0)
        rank = mesh.get_local_rank()
        part = chunks[rank] if rank < len(chunks) else part[:0]
    return DTensor.from_local(
        part.to(target.device).contiguous(), target.device_mesh, target.placements,
        run_check=False, shape=target.shape, stride=target.stride(),
    )  # fmt: skip


def flag_like(flag: Tensor, model_parameter: Tensor) -> Tensor:
    """``flag``, the same on all processes, in the form that an optimiser of such tensors takes."""
    if not isinstance(model_parameter, DTensor):
        return flag
    return DTensor.from_local(flag, model_parameter.device_mesh, [Replicate()], run_check=False)


# --- batch norm over all processes ----------------------------------------------------------------


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` with batch norms whose statistics are those of all processes' pictures together.

    Names and values of weights stay. On CUDA it is torch's own module, which has no form for the
    CPU; there the sums are exchanged by a differentiable all-reduce.
    """
    if device.type == "cuda":
        return convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.forward = _SyncedForward(module)
    return model


class _SyncedForward:
    """The forward pass of a batch norm with the statistics of all processes."""

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.norm
        if norm.training:
            y = _normalise(norm, x)
        else:
            y = F.batch_norm(
                x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
            )
        return norm.act(norm.drop(y)) if isinstance(norm, BatchNormAct2d) else y


def _normalise(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Training mode; ``x`` is (B, C, …), and B may differ between processes."""
    dims = [0, *range(2, x.ndim)]
    shape = [1, -1] + [1] * (x.ndim - 2)
    values = x.float()
    count = float(x.numel() // x.shape[1])
    # In float64 the sums of squares of all processes lose nothing of the variance.
    part = [moment.double() for moment in torch.var_mean(values, dims, correction=0)]
    moments = torch.stack([part[1], part[0] + part[1].square(), torch.ones_like(part[0])])
    moments = torch.distributed.nn.functional.all_reduce(moments * count)  # (3, C)
    total = moments[2]
    mean, square = moments[0] / total, moments[1] / total
    variance = (square - mean.square()).float()  # (C,)
    mean = mean.float()
    if norm.track_running_stats:
        with torch.no_grad():
            norm.num_batches_tracked += 1
            momentum = norm.momentum
            if momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked)
            norm.running_mean.lerp_(mean, momentum)
            norm.running_var.lerp_(variance * (total / (total - 1)).float(), momentum)
    y = (values - mean.view(shape)) * torch.rsqrt(variance + norm.eps).view(shape)
    if norm.affine:
        y = y * norm.weight.view(shape) + norm.bias.view(shape)
    return y.to(x.dtype)


# --- sharded checkpoints --------------------------------------------------------------------------


def _split(value: Any, name: str, sharded: dict[str, DTensor]) -> Any:
    """``value`` with a placeholder for each sharded tensor, which is put into ``sharded``."""
    if isinstance(value, DTensor):
        sharded[name] = value
        dtype = str(value.dtype).removeprefix("torch.")
        return {_PLACE: name, "shape": list(value.shape), "dtype": dtype}
    if isinstance(value, Mapping):
        return {k: _split(v, f"{name}.{k}", sharded) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_split(v, f"{name}.{i}", sharded) for i, v in enumerate(value))
    return value


def _join(value: Any, make: Callable[[str, tuple[int, ...], torch.dtype], Tensor]) -> Any:
    """``value`` with ``make(name, shape, type)`` in the place of each placeholder."""
    if isinstance(value, Mapping):
        if _PLACE in value:
            return make(value[_PLACE], tuple(value["shape"]), getattr(torch, value["dtype"]))
        return {k: _join(v, make) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_join(v, make) for v in value)
    return value


def _on_host(value: DTensor, mesh: DeviceMesh) -> DTensor:
    """A copy of ``value`` in host memory."""
    return DTensor.from_local(
        value.to_local().detach().to("cpu", copy=True), mesh, value.placements,
        run_check=False, shape=value.shape, stride=value.stride(),
    )  # fmt: skip


class ShardedWriter:
    """Writes a run's sharded checkpoints while training goes on; used by all processes alike.

    As checkpoint.BackgroundWriter: :meth:`submit` returns once this process's part is copied to
    host memory, and errors of the file system are kept, on all processes, not raised.

    Args:
        folder: the run's.
        save_rest: writes a file of plain tensors, ``(path, content)``.
        finished: called on the main process with each folder that was written whole.

    Attributes:
        saved: the newest checkpoint that was written whole.
        error: why the last one failed, or None.
    """

    def __init__(
        self,
        folder: Path,
        *,
        save_rest: Callable[[Path, Mapping[str, Any]], None],
        finished: Callable[[Path], None],
    ) -> None:
        self.folder = folder
        self.save_rest = save_rest
        self.finished = finished
        self.saved: Path | None = None
        self.error: OSError | None = None
        self._thread: threading.Thread | None = None
        # Of its own, so that the thread's exchanges don't mix with those of training.
        self._group = dist.new_group(backend="gloo")
        self._mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def submit(self, name: str, content: Mapping[str, Any]) -> None:
        """Write ``content`` as it is now to the folder ``name``, after the write under way."""
        self.wait()
        sharded: dict[str, DTensor] = {}
        rest = _split(content, "", sharded)
        # What isn't sharded is the same everywhere and small.
        rest = utils.copy_to_host(rest)
        sharded = {name: _on_host(value, self._mesh) for name, value in sharded.items()}
        self._thread = threading.Thread(target=self._write, args=(name, rest, sharded))
        self._thread.start()

    def wait(self) -> None:
        """Until everything submitted is on disk or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, name: str, rest: dict[str, Any], sharded: dict[str, DTensor]) -> None:
        path, temporary = self.folder / name, self.folder / f".{name}.tmp"
        main = dist.get_rank() == 0
        checksums: dict[str, int] = {}

        def prepare() -> None:
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)

        def write_tensors() -> None:
            # One thread: with more the order of the tensors in the files would vary.
            writer = dcp.FileSystemWriter(temporary, thread_count=1, overwrite=True)
            dcp.save(sharded, storage_writer=writer, process_group=self._group)

        def check() -> None:
            for file in sorted(temporary.glob(f"__{dist.get_rank()}_*.distcp")):
                checksums[file.name] = _checksum(file)

        def conclude() -> None:
            if main:
                self.save_rest(temporary / REST, rest | {"files": merged})
                aside = self.folder / f".{name}.old"
                if path.exists():
                    path.rename(aside)
                temporary.rename(path)
                shutil.rmtree(aside, ignore_errors=True)
                self.finished(path)

        failure = self._agree(prepare) or self._agree(write_tensors) or self._agree(check)
        if failure is None:
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, checksums, group=self._group)
            merged = {k: v for part in parts for k, v in part.items()}
            failure = self._agree(conclude)
        if failure is None:
            self.saved, self.error = path, None
            return
        self.error = OSError(failure)
        if main:
            log.warning(
                "no checkpoint was written to %s: %s. Training goes on and the older ones stay; "
                "free space there", self.folder, failure,
            )  # fmt: skip
            shutil.rmtree(temporary, ignore_errors=True)

    def _agree(self, action: Callable[[], None]) -> str | None:
        """Do ``action``; the first process's reason, on all, why it failed somewhere."""
        reason = None
        try:
            action()
        except OSError as error:
            reason = error.strerror or str(error)
        except CheckpointException as error:
            reason = "; ".join(f"process {r}: {e[0]}" for r, e in error.failures.items())
        reasons: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason, group=self._group)
        return next((r for r in reasons if r is not None), None)


def _checksum(path: Path) -> int:
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
    for name, checksum in files[rank::world]:
        path = folder / Path(name).name
        if not path.is_file():
            problem = f"{path.name} is missing"
        elif _checksum(path) != checksum:
            problem = f"{path.name} is damaged"
    problems = utils.gather(problem) if scattered else [problem]
    problem = next((p for p in problems if p), None)
    if problem:
        raise CheckpointError(f"checkpoint {folder} can't be read: {problem}")
    tensors: dict[str, Tensor] = {}
    mesh = init_device_mesh("cpu", (world,)) if scattered else None

    def make(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if mesh is None:
            tensors[name] = torch.empty(shape, dtype=dtype)
        else:
            tensors[name] = empty_sharded(
                *shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)]
            )
        return tensors[name]

    content = _join(rest, make)
    try:
        # Without exchanges: every process finds its parts in the files by itself.
        dcp.load(tensors, storage_reader=_Reader(folder), no_dist=True)
    except (CheckpointException, OSError, RuntimeError) as error:
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint {folder} can't be read: {reason}") from None
    return content


_METADATA = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "bool",
              "device"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "Path"),
    "pathlib._local": ("PosixPath", "WindowsPath", "PurePosixPath", "Path"),
    "collections": ("OrderedDict",),
}  # fmt: skip


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
            raise pickle.UnpicklingError("its metadata is none")
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
