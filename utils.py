"""Processes, devices and random numbers: what every room needs and no room owns."""

import hashlib
import importlib
import importlib.util
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from errors import OptionError, UserError

try:
    import resource
except ImportError:  # not a Unix
    resource = None

# --- random numbers -------------------------------------------------------------------------------


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
    """Seed the global generators of the host only: what picture transforms draw from."""
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


# --- devices --------------------------------------------------------------------------------------


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
                "device", f"cuda:{index} doesn't exist, there are {count}: start at most {count} "
                "processes a machine"
            )  # fmt: skip
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


# Dense bf16 or fp16 matrix products, 10¹² operations a second, from the makers' data sheets. A name
# that holds another comes first.
PEAKS = (
    ("GB200", 2250), ("B200", 2250), ("B100", 1750), ("GH200", 989), ("H200", 989),
    ("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989), ("A100", 312), ("A800", 312),
    ("A40", 150), ("A30", 165), ("A10G", 70), ("A10", 125), ("L40S", 362), ("L40", 181),
    ("L4", 121), ("V100", 125), ("T4", 65), ("RTX 4090", 165), ("RTX 3090", 71),
)  # fmt: skip


def device_peak(device: torch.device, amp: torch.dtype | None) -> float | None:
    """Floating-point operations a second that ``device`` can do in ``amp``, None if not known."""
    if device.type != "cuda" or amp is None:
        return None
    name = torch.cuda.get_device_name(device)
    if amp == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return None  # it has no units for that
    return next((1e12 * peak for part, peak in PEAKS if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: allocated on a CUDA ``device``, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


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


# --- processes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those that train together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.world_size > 1


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast_buffers(model: torch.nn.Module) -> None:
    """Give every process the main process's buffers (batch-norm statistics)."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        # Not dist.barrier(): with NCCL that would occupy the device.
        dist.all_reduce(torch.zeros(1))


def gather(value: Any) -> list[Any]:
    """``value`` of every process, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def any_process(wish: bool) -> bool:
    """Whether any process wishes so; to be called by all."""
    if not dist.is_initialized():
        return wish
    votes = torch.tensor(int(wish))
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes)


def on_main_process(processes: Processes, action: Callable[[], None]) -> None:
    """The main process does ``action``; what it raises for a person is raised on all processes."""
    failure: list[UserError | None] = [None]
    if processes.is_main:
        try:
            action()
        except UserError as error:
            failure = [error]
    if processes.distributed:
        dist.broadcast_object_list(failure, device=torch.device("cpu"))
    if failure[0] is not None:
        raise failure[0]


@contextmanager
def main_process_first(processes: Processes) -> Iterator[None]:
    """The main process goes through the block alone (it may download), then the others."""
    if not processes.is_main:
        barrier()
    yield
    if processes.is_main:
        barrier()


def process_runs(pid: int) -> bool:
    """Whether the process ``pid`` of this machine is still at work."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:
        return True


class StopRequest:
    """Turns Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 into a wish to stop at the next step boundary.

    SLURM warns of a time limit or preemption with a signal of the user's choice, and ends a
    cancelled job with SIGTERM.

    Every process must leave at the same step, or the others would wait for it in the next gradient
    exchange: :meth:`agreed` is true for all as soon as one process was asked. A second Ctrl-C
    leaves at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._asked = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _handle(self, number: int, frame: object) -> None:
        # A launcher passes on the Ctrl-C that the terminal has sent to all processes already.
        again = self.signal is not None and time.monotonic() - self._asked > 1.0
        if again and number == signal.SIGINT:
            os._exit(128 + number)
        if self.signal is None:
            self.signal, self._asked = number, time.monotonic()
            if number == signal.SIGINT and sys.stderr.isatty():
                # Not a message of logging, whose locks a signal handler must not take.
                os.write(2, b"\nstopping after this step; Ctrl-C again leaves at once\n")

    def agreed(self) -> bool:
        """Whether any process was asked to stop; to be called by all at the same step."""
        if not dist.is_initialized():
            return self.signal is not None
        wish = torch.tensor([self.signal or 0])
        dist.all_reduce(wish, dist.ReduceOp.MAX)
        self.signal = int(wish) or None
        return self.signal is not None


# --- messages -------------------------------------------------------------------------------------


class _Console(logging.Handler):
    """Writes messages to standard output, above a progress bar if one is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stdout):
            print(self.format(record), flush=True)


def setup_messages(processes: Processes) -> None:
    """Messages go to standard output; other processes' only from warnings up, with the rank."""
    handler = _Console()
    if processes.is_main:
        handler.setFormatter(_Formatter())
    else:
        handler.setFormatter(
            logging.Formatter(f"[rank {processes.rank}] %(levelname)s: %(message)s")
        )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if processes.is_main else logging.WARNING)
    # Libraries speak up from warnings on.
    for name in ("timm", "matplotlib", "PIL", "torch", "submitit"):
        logging.getLogger(name).setLevel(logging.WARNING)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


# --- plugins --------------------------------------------------------------------------------------


def import_plugins(names: Sequence[str]) -> None:
    """Import the user's files or modules, which register models, data sets or transforms."""
    for name in names:
        try:
            if name.endswith(".py"):
                path = Path(name).expanduser().resolve()
                if not path.is_file():
                    raise OptionError("plugin", f"{name} does not exist")
                spec = importlib.util.spec_from_file_location(path.stem, path)
                module = importlib.util.module_from_spec(spec)
                # Loader processes find the plugin's classes by this name.
                sys.modules[path.stem] = module
                spec.loader.exec_module(module)
            else:
                importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise OptionError("plugin", f"{name}: no module named {error.name!r}") from None
