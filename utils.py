"""Random numbers, devices and files that are written whole."""

import hashlib
import logging
import os
import random
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from errors import OptionError, without_surrogates

try:
    import resource
except ImportError:  # not a Unix
    resource = None


@lru_cache(maxsize=64, typed=True)  # the same for many images in a row
def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all ``parts`` and on nothing else.

    Augmentation seeds are derived from (seed, "sample", epoch, position), dropout seeds from
    (seed, "step", step, rank): randomness is a function of where training stands, so a resumed run
    draws what the uninterrupted one would have drawn.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (CUDA's too)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_host(seed: int) -> None:
    """Seed the global generators of the host only: what image transforms draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The states of all global generators, as tensors and primitives."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` returned; CUDA's only where the device count is the same."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of ``--device``; ``auto`` is CUDA where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError("device", f"{name!r} is none of auto, cpu, cuda, cuda:N, mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = local_rank if device.index is None else device.index
        if count == 0:
            raise OptionError("device", "no CUDA device here: use --device cpu, or auto")
        if index >= count:
            raise OptionError(
                "device",
                f"cuda:{index} doesn't exist, there are {count}: start at most {count} "
                "processes per machine",
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise OptionError("device", "no MPS device here: use --device cpu, or auto")
    elif device.type not in ("cpu", "mps"):
        raise OptionError("device", f"{name!r} is none of auto, cpu, cuda, cuda:N, mps")
    return device


def set_determinism(deterministic: bool) -> None:
    """Deterministic algorithms only, or the fastest."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    torch.set_float32_matmul_precision("highest" if deterministic else "high")


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: allocated on a CUDA ``device``, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def bytes_written(thread: int) -> int:
    """Bytes that a thread (its ``native_id``) has handed to the system so far; 0 if not known."""
    try:
        with open(f"/proc/self/task/{thread}/io", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("wchar"))
    except (OSError, StopIteration):
        return 0


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of ``--amp`` on ``device``; None is float32 throughout."""
    if amp == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if amp == "fp16" and device.type == "mps":
        raise OptionError("amp", "fp16 needs loss scaling, which MPS lacks: use --amp bf16 or off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def copy_to_host(value: Any) -> Any:
    """A copy of ``value`` with all tensors in it, at any depth, in host memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {k: copy_to_host(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_to_host(v) for v in value)
    return value


def cores() -> int:
    """Processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@contextmanager
def written_whole(path: Path, *, durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it takes the name ``path`` when that is done.

    So ``path`` is always either the old file or the new one, whole; a write that fails leaves
    nothing behind. ``durable``: the new file survives a crash of the machine too, unless a warning
    says that the folder can't be synced. ``shared``: other processes, of other machines too, may
    write the same file at the same time.
    """
    own = f".{socket.gethostname()}-{os.getpid()}" if shared else ""
    temporary = path.with_name(f".{path.stem}{own}.tmp{path.suffix}")
    try:
        yield temporary
        if durable:
            _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # the reason is the error before
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        try:
            _sync(path.parent)
        except OSError as error:  # some network disks can't: the file is there all the same
            text = (
                "%s: its folder can't be synced (%s): a crash of the machine now may lose the file"
            )
            logging.getLogger(__name__).warning(text, path, error.strerror)


def write_text(path: Path, text: str) -> None:
    """Write ``text``, whole, as UTF-8; what no UTF-8 is, in words: see ``without_surrogates``."""
    with written_whole(path) as temporary:
        temporary.write_text(without_surrogates(text), encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
