"""A run obeys signals at any moment: while storage hangs, while it reads, evaluates and saves.

Storage that hangs is a pipe that nobody writes to: with the plug-in of ``hanging`` whoever opens it
waits for ever.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import hanging
import holding
import pytest
from runs import (
    PATIENCE,
    ROOT,
    arguments,
    assert_same_state,
    fork_process,
    logged,
    newest,
    run_processes,
    start_process,
    train,
    train_together,
)
from tiny_images import image_folder

from checkpointing.folder import checkpoints_in
from errors import Stopped
from training.signals import StopRequest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
SOON = 60.0  # seconds that obeying a signal takes at most, on a machine that does much else
EVERY_IMAGE = ("--no-repeated-aug",)
OPENING = {"wait_for_partner", "fifo_open"}  # where the kernel holds whoever opens a pipe


@pytest.fixture
def own_images(tmp_path) -> Path:
    """Images as in the fixture ``images``, to be changed."""
    return image_folder(tmp_path / "images", {"train": 8, "val": 3})


def replace_by_pipe(path: Path) -> bytes:
    """Put a pipe in the place of a file; returns the file's content."""
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    return content


def processes_of(pid: int) -> Iterator[int]:
    """``pid`` and all that it has started."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from processes_of(int(child))


def start_hanging(argv: list[str], launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A run that a pipe in the place of an image holds."""
    if "--plugin" in argv:
        at = argv.index("--plugin") + 1
        argv = [*argv[:at], hanging.__file__, *argv[at:]]
    else:
        argv = [*argv, *hanging.OPTIONS]
    if not launcher:
        return fork_process(argv, **hanging.ENVIRONMENT)
    return start_process(argv, launcher, **hanging.ENVIRONMENT)


def impatient(folder: Path) -> tuple[str, str]:
    """Options of a run that gives up after two seconds what it usually waits longer for."""
    plugin = folder / "impatient.py"
    plugin.write_text(
        "import checkpointing.writer, training.signals\n"
        "checkpointing.writer.GIVE_UP = training.signals.PATIENCE = 2.0\n"
    )
    return "--plugin", str(plugin)


def wait_until_held(process: subprocess.Popen[str]) -> list[int]:
    """Wait until a thread of a run opens a pipe; returns the processes that do."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        held = []
        try:
            for pid in processes_of(process.pid):
                places = [p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/wchan")]
                if OPENING.intersection(places):
                    held.append(pid)
        except OSError:  # one ended meanwhile
            continue
        if held:
            return held
        time.sleep(0.05)
    raise TimeoutError("nothing opens the pipe")


def obeys(process: subprocess.Popen[str], number: int, *, held: bool = True) -> tuple[int, str]:
    """Send a signal to a run that storage holds; its exit code and output."""
    if held:
        wait_until_held(process)
    process.send_signal(number)
    try:
        output, _ = process.communicate(timeout=SOON)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


@pytest.mark.parametrize("number, workers", [(signal.SIGTERM, 2), (signal.SIGINT, 0)])
def test_a_signal_is_obeyed_while_storage_holds_an_image(own_images, tmp_path, number, workers):
    """What was trained is saved, and the resumed run ends like one that wasn't stopped."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    options = (*EVERY_IMAGE, "--cache", "none", "--epochs", "1", "--warmup-epochs", "0")
    assert train(own_images, whole, *options) == 0
    path = own_images / "train" / "blue" / "3.png"
    content = replace_by_pipe(path)
    argv = arguments(own_images, folder, *options, "--num-workers", str(workers))
    code, output = obeys(start_hanging(argv), number)
    assert code == 128 + number, output
    assert f"stopped by signal {number}; saved" in output and "Traceback" not in output
    assert not (folder / "run.lock").exists()
    path.unlink()
    path.write_bytes(content)
    assert train(own_images, folder, *options, "--resume", "auto") == 0
    assert_same_state(newest(folder), newest(whole))


def test_what_was_done_of_an_update_is_done_again(own_images, tmp_path):
    """Batch norm and losses are those of whole updates, also where two of four batches came."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    options = (*EVERY_IMAGE, "--cache", "none", "--model", "simple_cnn", "--epochs", "2")
    options += ("--batch-size", "2", "--accum-steps", "4")
    assert train(own_images, whole, *options) == 0
    waits = 0

    @contextlib.contextmanager
    def waiting(stop: StopRequest) -> Iterator[None]:
        nonlocal waits
        waits += 1
        if waits == 7:
            stop.signal = signal.SIGTERM
            raise Stopped(signal.SIGTERM)
        yield

    with mock.patch.object(StopRequest, "waiting", waiting):
        assert train(own_images, folder, *options) == 143
    assert newest(folder)["progress"]["step"] == 4
    assert train(own_images, folder, *options, "--resume", "auto") == 0
    assert_same_state(newest(folder), newest(whole))
    assert logged(folder) == logged(whole)


def test_a_signal_is_obeyed_while_images_are_cached(own_images, tmp_path):
    replace_by_pipe(own_images / "train" / "blue" / "3.png")
    folder = tmp_path / "run"
    process = start_hanging(arguments(own_images, folder, "--cache", "ram"))
    code, output = obeys(process, signal.SIGTERM)
    assert code == 143, output
    assert "stopped by signal 15; there was nothing to save" in output
    assert "Traceback" not in output
    assert not (folder / "run.lock").exists() and not checkpoints_in(folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_is_obeyed_in_an_evaluation(own_images, tmp_path, workers):
    """The epoch is trained and saved; the resumed run evaluates and goes on like a whole one."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    options = (*EVERY_IMAGE, "--cache", "none", "--epochs", "2")
    assert train(own_images, whole, *options) == 0
    path = own_images / "val" / "blue" / "1.png"
    content = replace_by_pipe(path)
    argv = arguments(own_images, folder, *options, "--num-workers", str(workers))
    code, output = obeys(start_hanging(argv), signal.SIGTERM)
    assert code == 143, output
    progress = newest(folder)["progress"]
    assert (progress["epoch"], progress["update"], progress["step"]) == (0, 6, 6)
    path.unlink()
    path.write_bytes(content)
    assert train(own_images, folder, *options, "--resume", "auto") == 0
    assert_same_state(newest(folder), newest(whole))
    assert logged(folder) == logged(whole)


def test_an_evaluation_of_a_checkpoint_obeys(own_images, tmp_path):
    assert train(own_images, tmp_path, "--epochs", "1", "--warmup-epochs", "0") == 0
    replace_by_pipe(own_images / "val" / "blue" / "1.png")
    argv = ["--eval", "--resume", str(tmp_path / "best.pth"), "--cache", "none"]
    process = start_hanging([*argv, "--num-workers", "1", "--device", "cpu"])
    code, output = obeys(process, signal.SIGTERM)
    assert code == 143 and "stopped by signal 15" in output, output


def test_a_checkpoint_that_storage_holds_is_given_up(images, tmp_path):
    """Said, with exit code 1; what was saved before stays."""
    folder = tmp_path / "run"
    options = (*impatient(tmp_path), *holding.OPTIONS[1:])
    argv = arguments(images, folder, "--cache", "none", *options)
    process = fork_process(argv, **holding.variables(tmp_path, 8))
    holding.wait_for_hold(
        tmp_path, 0, lambda: process.poll() is not None, lambda: process.communicate()[0]
    )
    os.mkfifo(folder / ".checkpoint-0001-00000008.tmp.pth")
    code, output = obeys(process, signal.SIGTERM, held=False)
    assert code == 1, output
    assert "could NOT be saved" in output and "Traceback" not in output
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-0001.pth"]


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_ends_a_run_unless_nohup_has_it_ignored(own_images, tmp_path, ignored):
    path = own_images / "train" / "blue" / "3.png"
    content = replace_by_pipe(path)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        process = start_hanging(
            arguments(own_images, tmp_path / "run", *EVERY_IMAGE, "--cache", "none")
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_until_held(process)
    process.send_signal(signal.SIGHUP)
    if ignored:
        time.sleep(1)
        assert process.poll() is None
        with open(path, "wb") as pipe:  # the storage is back
            path.unlink()
            path.write_bytes(content)
            pipe.write(content)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == (0 if ignored else 129)


def test_workers_end_with_a_run_that_is_killed(own_images, tmp_path):
    """Also one that storage holds."""
    replace_by_pipe(own_images / "train" / "blue" / "3.png")
    argv = arguments(
        own_images, tmp_path / "run", *EVERY_IMAGE, "--cache", "none", "--num-workers", "1"
    )
    process = start_hanging(argv)
    (worker,) = wait_until_held(process)
    assert worker != process.pid
    process.kill()
    process.communicate(timeout=PATIENCE)
    deadline = time.monotonic() + SOON
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline, "the worker goes on"
        time.sleep(0.05)


def test_two_processes_obey_while_storage_holds_one(own_images, tmp_path):
    """The one that waits leaves alone, after a while; the other learns of it."""
    replace_by_pipe(own_images / "train" / "blue" / "3.png")
    folder = tmp_path / "run"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    options = (*EVERY_IMAGE, "--cache", "none", *impatient(tmp_path))
    process = start_hanging(arguments(own_images, folder, *options), launcher)
    wait_until_held(process)
    for pid in processes_of(process.pid):
        if b"main.py" in Path(f"/proc/{pid}/cmdline").read_bytes() and pid != process.pid:
            os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode, output
    assert "process" in output and "stopped by signal 15" in output, output
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in output
    assert not (folder / "run.lock").exists() or not checkpoints_in(folder)


STOPS_IN_EVALUATION = """
import os, signal
import engine

evaluate = engine.evaluate

def stopped(*args, **options):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(*args, **options)

engine.evaluate = stopped
"""


@pytest.mark.parametrize("options", [(), ("--fsdp",)])
def test_processes_leave_an_evaluation_together(own_images, tmp_path, options):
    """Though one alone is asked to, and has one batch more to evaluate than the other."""
    (tmp_path / "stops.py").write_text(STOPS_IN_EVALUATION)
    options += ("--epochs", "1", "--warmup-epochs", "0", "--eval-batch-size", "4")
    argv = arguments(own_images, tmp_path / "run", *options, "--plugin", str(tmp_path / "stops.py"))
    codes, output = run_processes(argv, tmp_path / "log")
    assert codes == [143, 143], output
    argv = arguments(own_images, tmp_path / "run", *options, "--resume", "auto")
    codes, output = run_processes(argv, tmp_path / "log2")
    assert codes == [0, 0], output
    whole = train_together(own_images, tmp_path / "whole", *options)
    assert_same_state(newest(tmp_path / "run"), whole)
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
