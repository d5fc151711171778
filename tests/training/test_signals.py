"""Signals: the first saves and ends the run, a second Ctrl-C leaves at once."""

import re
import signal
import threading
import time
from pathlib import Path

import holding
import pytest
from runs import (
    PATIENCE,
    STOPPED,
    Terminal,
    arguments,
    fork_process,
    logged,
    newest,
    stopped_after,
    train,
)

import main
from checkpointing.folder import checkpoints_in
from errors import Stopped
from training.signals import NUMBERS, TIME_IS_UP, StopRequest


def stopped_by(number: int, images: Path, folder: Path, *options: str) -> tuple[int, str]:
    """Exit code and output of a run that is sent a signal after its eighth update, of 18."""
    argv = arguments(images, folder, *options, *holding.OPTIONS)
    process = fork_process(argv, **holding.variables(folder.parent, 8))
    holding.wait_for_hold(
        folder.parent, 0, lambda: process.poll() is not None, lambda: process.communicate()[0]
    )
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, output


@pytest.mark.parametrize("number", NUMBERS)
def test_a_request_is_kept_until_it_is_asked_for(number):
    before = signal.getsignal(number)
    with StopRequest() as stop, stop.deferred():
        assert not stop.agreed() and stop.signal is None
        signal.raise_signal(number)
        assert stop.agreed() and stop.signal == number
        # The one that came first counts.
        signal.raise_signal(signal.SIGUSR1)
        assert stop.agreed() and stop.signal == number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", NUMBERS)
def test_before_there_is_anything_to_save_a_signal_leaves_at_once(number):
    with StopRequest(), pytest.raises(Stopped) as caught:
        signal.raise_signal(number)
    assert caught.value.exit_code == 128 + number


def test_a_wait_ends_with_a_signal_that_came_before_or_comes():
    with StopRequest() as stop, stop.deferred():
        with pytest.raises(Stopped), stop.waiting():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped), stop.waiting():
            raise AssertionError("nothing is waited for any more")


def test_whoever_started_the_run_keeps_its_signals_until_training():
    came = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGUSR1)
            with stop.deferred():
                signal.raise_signal(signal.SIGUSR1)
                assert stop.agreed()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert came == [signal.SIGUSR1]


def test_another_thread_leaves_signals_alone():
    def enter() -> None:
        with StopRequest() as stop, stop.deferred(), stop.waiting():
            found.append(signal.getsignal(signal.SIGTERM))

    found: list[object] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_a_stop_in_mid_epoch_saves_where_it_stood(images, tmp_path, capsys):
    with stopped_after(8):
        assert train(images, tmp_path) == STOPPED
    output = capsys.readouterr().out
    saved = tmp_path / "checkpoint-0001-00000008.pth"  # two batches of four into the second epoch
    assert f"stopped by signal 15; saved {saved}" in output
    assert f"go on with: python main.py --resume {saved}" in output
    progress = newest(tmp_path)["progress"]
    assert (progress["update"], progress["step"], progress["samples"]) == (8, 2, 8)
    assert not (tmp_path / "run.lock").exists()


def test_ctrl_c_saves_and_says_how_to_go_on(images, tmp_path):
    folder = tmp_path / "run"
    code, output = stopped_by(signal.SIGINT, images, folder, "--num-workers", "1")
    assert code == 130, output
    assert "Traceback" not in output
    assert newest(folder)["progress"]["update"] == 8
    command = re.search(r"go on with: python main.py (.*)", output)[1]
    assert main.main([*command.split(), "--stop-at-epoch", "2"]) == 0
    assert [r["epoch"] for r in logged(folder)] == [1, 2]


def test_a_warning_of_a_cluster_saves_and_leaves(images, tmp_path):
    """SIGUSR1, as SLURM sends it before a time limit, to a run without SLURM."""
    folder = tmp_path / "run"
    code, output = stopped_by(signal.SIGUSR1, images, folder, "--save-every", "1000")
    assert code == 128 + signal.SIGUSR1, output
    assert Path(re.search(r"saved (\S+)", output)[1]) == checkpoints_in(folder)[0]


SLOW = """
import time
import timm
from torch import nn

class Slow(nn.Module):
    def forward(self, x):
        if self.training and len(x) == 4:
            print("a step of a minute", flush=True)
            time.sleep(60)
        return x

@timm.models.register_model
def slow(pretrained=False, num_classes=2, **kwargs):
    return nn.Sequential(Slow(), nn.Flatten(), nn.Linear(192, num_classes))
"""


def test_a_second_ctrl_c_leaves_at_once(images, tmp_path):
    """On a terminal, in the middle of a step that takes a minute."""
    (tmp_path / "slow.py").write_text(SLOW)
    options = ("--plugin", str(tmp_path / "slow.py"), "--model", "slow")
    terminal = Terminal(arguments(images, tmp_path / "run", *options))
    terminal.read_until("a step of a minute")
    terminal.type("\x03")
    terminal.read_until("stopping after this step; Ctrl-C again leaves at once")
    # A launcher passes on the signal that the terminal has sent already: still the first.
    terminal.type("\x03")
    time.sleep(1.5)
    assert terminal.running()
    terminal.type("\x03")
    assert terminal.wait(20) == 130, terminal.text
    assert "Traceback" not in terminal.text and "saved" not in terminal.text
    assert not checkpoints_in(tmp_path / "run")


def test_ctrl_c_before_training_leaves_without_a_checkpoint(images, tmp_path):
    """While plug-ins are imported, for example."""
    (tmp_path / "slow.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)")
    options = ("--plugin", str(tmp_path / "slow.py"))
    terminal = Terminal(arguments(images, tmp_path / "run", *options))
    terminal.read_until("importing")
    terminal.type("\x03")
    assert terminal.wait() == 130, terminal.text
    assert "interrupted; there was nothing to save" in terminal.text
    assert "Traceback" not in terminal.text


def test_the_end_of_a_sessions_time():
    with StopRequest(hours=1e-7) as stop, stop.deferred():
        assert stop.signal is None
        time.sleep(0.001)
        assert stop.agreed() and stop.signal == TIME_IS_UP
        with stop.waiting():  # images are waited for as before
            pass
        # Another wish to stop gives its exit code, and does not leave at once.
        signal.raise_signal(signal.SIGINT)
        assert stop.agreed() and stop.signal == signal.SIGINT
    with StopRequest(hours=1) as stop:
        assert not stop.agreed() and stop.signal is None
