"""Whole training runs on tiny images: what the tests of training, engine and logs share."""

import contextlib
import faulthandler
import fcntl
import json
import os
import pty
import runpy
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

import main
from checkpointing.folder import load_newest
from tools.torture import comparing, processes

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("amber", "blue", "crimson")
STOPPED = 128 + signal.SIGTERM
# Seconds until a process that should have ended is a failure: no slow machine needs them.
PATIENCE = 300
# Nothing is drawn for a whole batch or process, so 2 × B images give the step of 1 × 2B.
PLAIN = ("--aa", "none", "--color-jitter", "none", "--reprob", "0", "--mixup", "0", "--cutmix", "0")
PLAIN += ("--no-repeated-aug", "--drop-path", "0", "--smoothing", "0")


def arguments(images: Path | str, folder: Path, *more: str) -> list[str]:
    """A command line: three epochs of six updates of the DeiT recipe on the images fixture."""
    argv = ["--data-path", images, "--output-dir", folder, "--model", "deit_nano_patch4_32"]
    argv += ["--input-size", "8", "--batch-size", "4", "--epochs", "3", "--warmup-epochs", "1"]
    argv += ["--num-workers", "0", "--device", "cpu", "--lr", "0.01", "--log-interval", "2"]
    return [str(a) for a in (*argv, "--no-tensorboard", *more)]


def train(images: Path, folder: Path, *more: str) -> int:
    """The exit code of that run, in this process."""
    return main.main(arguments(images, folder, *more))


# The records of a log.txt, without what differs between two runs of the same options.
logged = comparing.log_of


def newest(folder: Path) -> dict[str, Any]:
    """The newest checkpoint of ``folder``."""
    return load_newest(folder)[1]


# --- interfering with a run ---------------------------------------------------------------------


@contextlib.contextmanager
def at_update(number: int, action: Callable[[], object]) -> Iterator[None]:
    """Call ``action`` right after the ``number``-th step of the optimiser in this block."""
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        if done == number:
            action()

    hook = register_optimizer_step_post_hook(count)
    try:
        yield
    finally:
        hook.remove()


def stopped_after(updates: int) -> contextlib.AbstractContextManager[None]:
    """A run in this block gets SIGTERM in its ``updates``-th update."""
    return at_update(updates, lambda: signal.raise_signal(signal.SIGTERM))


# --- comparing runs -----------------------------------------------------------------------------


def assert_same_state(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    """Bitwise equality of everything a checkpoint holds, but for times."""
    for part in ("model", "model_ema", "optimizer", "schedule", "scaler", "progress"):
        assert_equal(left[part], right[part], part)


def assert_equal(left: Any, right: Any, where: str) -> None:
    """Bitwise equality of nested containers of tensors and primitives."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_equal(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_equal(a, b, f"{where}[{i}]")
    else:
        assert left == right, where


def assert_close(left: Mapping[str, Any], right: Mapping[str, Any], part: str = "model") -> None:
    """Two checkpoints' weights are equal but for rounding."""
    assert left[part].keys() == right[part].keys()
    for name, weight in left[part].items():
        torch.testing.assert_close(weight, right[part][name], rtol=1e-4, atol=1e-6, msg=name)


# --- runs in processes of their own -------------------------------------------------------------


def start_process(
    argv: list[str], launcher: tuple[str, ...] = (), **environment: str
) -> subprocess.Popen[str]:
    """main.py in a process of its own; its output and errors are one pipe."""
    command = [sys.executable, *launcher, str(ROOT / "main.py"), *argv]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def fork_process(argv: list[str], **environment: str) -> subprocess.Popen[str]:
    """As :func:`start_process`, forked from this process.

    That spares it the seconds of importing torch, and libraries read their variables before.
    """
    return subprocess.Popen(
        [sys.executable],  # the run ends before it would be started
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: _become_main(argv, environment),
        restore_signals=False,  # Python itself ignores SIGPIPE
    )


def _become_main(argv: list[str], environment: Mapping[str, str]) -> NoReturn:
    """What ``python main.py`` does, in a process that was forked; then it ends."""
    code: object = 1
    try:
        faulthandler.disable()  # its file is closed
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # Popen waits until one is closed
        sys.stdin = os.fdopen(0)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        # A suite that was started in the background ignores it, and so would the process.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(ROOT)
        os.environ.update(environment)
        sys.argv = [str(ROOT / "main.py"), *argv]
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def run_processes(
    argv: list[str], log: Path, world: int = 2, **environment: str
) -> tuple[list[int] | None, str]:
    """Exit codes of ``world`` processes that train together, and what they printed.

    They are forked from this one, which spares each the seconds of importing torch. None in place
    of the exit codes: they were killed after PATIENCE seconds.
    """
    pids = processes.start(argv, world, log, environment)
    codes = processes.wait(pids, time.monotonic() + PATIENCE)
    if codes is None:
        processes.kill(pids)
    return codes, log.read_text()


def on_each_process(folder: Path, world: int, work: Callable[[int], Any]) -> list[Any]:
    """What ``work(rank)`` returns, as JSON, on each of ``world`` forked processes that have met."""
    pids = []
    for rank in range(world):
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 1
        try:
            meet = f"file://{folder}/meet"
            dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
            (folder / f"{rank}.json").write_text(json.dumps(work(rank)))
            code = 0
        finally:
            os._exit(code)
    assert processes.wait(pids, time.monotonic() + PATIENCE) == [0] * world
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def train_together(images: Path, folder: Path, *more: str, world: int = 2) -> dict[str, Any]:
    """The newest checkpoint of a run of several processes that must end well."""
    log = folder.with_name(f"{folder.name}.out")
    codes, output = run_processes(arguments(images, folder, *more), log, world)
    assert codes == [0] * world, output
    return newest(folder)


class Terminal:
    """main.py on a pseudo-terminal of 24 lines of 120 characters, forked from this process.

    Attributes:
        pid: of the process.
        text: all that was shown so far.
    """

    def __init__(self, argv: list[str], **environment: str) -> None:
        self.text = ""
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
            _become_main(argv, {"TERM": "xterm"} | environment)

    def type(self, keys: str) -> None:
        """Press keys; ``"\\x03"`` is Ctrl-C."""
        os.write(self._descriptor, keys.encode())

    def read_until(self, text: str, seconds: float = PATIENCE) -> None:
        """Wait until ``text`` is shown."""
        self._read(seconds, lambda: text in self.text)

    def running(self) -> bool:
        """Whether the process has not ended, as far as is known without waiting."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, options) is None

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code, once the process has ended."""
        self._read(seconds, lambda: False)
        os.close(self._descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self, seconds: float, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if not select.select([self._descriptor], [], [], max(0, deadline - time.monotonic()))[
                0
            ]:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(self.text)
            try:
                self.text += os.read(self._descriptor, 4096).decode(errors="replace")
            except OSError:  # the process has ended
                return
