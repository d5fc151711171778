"""How processes meet, and what happens when one doesn't come or fails."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from runs import (
    ROOT,
    arguments,
    assert_same_state,
    logged,
    newest,
    run_processes,
    train,
    train_together,
)

from tools.torture.processes import free_port


def run(images: Path, folder: Path, *options: str, world: int = 2, **variables: str) -> tuple:
    """Exit codes of ``world`` processes, and what they printed."""
    return run_processes(
        arguments(images, folder / "run", "--epochs", "2", *options),
        folder / "run.out",
        world,
        **variables,
    )


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {k: str(v) for k, v in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}


def test_a_process_that_never_comes_is_named(images, tmp_path):
    port = free_port()
    codes, output = run(
        images, tmp_path, "--dist-start-timeout", "3", world=1, **environment(0, 3, port)
    )
    assert codes == [2], output
    assert "of 3 processes number 1, 2 did not come" in output and "within 3 s" in output
    assert "--world-size" in output and "Traceback" not in output


def test_a_port_in_use_is_said(images, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        variables = environment(0, 2, taken.getsockname()[1])
        options = ("--dist-start-timeout", "3")
        codes, output = run(images, tmp_path, *options, world=1, **variables)
        assert codes == [2], output
        assert "the port is in use" in output and "Traceback" not in output
        # Whoever would join there finds something else.
        variables |= {"RANK": "1", "LOCAL_RANK": "1"}
        codes, output = run(images, tmp_path, *options, world=1, **variables)
        assert codes == [2], output
        assert "process 1 of 2 can't meet the others" in output and "Traceback" not in output


def test_two_processes_of_one_number_are_an_error(images, tmp_path):
    variables = environment(0, 2, free_port()) | {"RANK": "2"}
    codes, output = run(images, tmp_path, world=1, **variables)
    assert codes == [2] and "2 processes have no number 2" in output


@pytest.mark.parametrize(
    "body, said",
    [
        ("raise ValueError('no such card')", "process 1 failed: ValueError: no such card"),
        ("os.kill(os.getpid(), 9)", "lost contact: process 1 is gone"),
        ("import no_such_module", "process 1 failed: --plugin"),
    ],
)
def test_a_process_that_fails_at_start_ends_all_and_is_named(images, tmp_path, body, said):
    plugin = tmp_path / "failing.py"
    plugin.write_text(f"import os\nif os.environ['RANK'] == '1':\n    {body}\n")
    codes, output = run(images, tmp_path, "--plugin", str(plugin))
    assert codes is not None and all(codes), output
    assert f"error: {said}" in output


DYING = """
import os
from torch.optim.optimizer import register_optimizer_step_post_hook

made = []

def count(*_):
    made.append(None)
    if len(made) == {update}:
        os.kill(os.getpid(), 9)

if os.environ["RANK"] == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
    register_optimizer_step_post_hook(count)
"""


def test_a_process_that_dies_in_training_ends_all(images, tmp_path):
    plugin = tmp_path / "dying.py"
    plugin.write_text(DYING.format(update=3))
    codes, output = run(images, tmp_path, "--batch-size", "2", "--plugin", str(plugin))
    assert sorted(codes) == [-9, 1], output
    assert "process 1 is gone" in output and "--resume auto" in output


def test_torchrun_restarts_and_goes_on_exactly(images, tmp_path):
    """A worker is killed; --max-restarts starts all again from the last step saved."""
    options = ("--epochs", "2", "--batch-size", "2")
    options += ("--save-every-steps", "1", "--log-interval", "1")
    expected = train_together(images, tmp_path / "whole", *options)
    folder = tmp_path / "elastic"
    plugin = tmp_path / "dying.py"
    plugin.write_text(DYING.format(update=9))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "1", str(ROOT / "main.py")]
    command += arguments(images, folder, *options, "--plugin", str(plugin))
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--resume", "auto"], cwd=ROOT, env=variables, text=True, capture_output=True
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    # Six updates per epoch: the third of the second epoch was under way.
    assert "resumed" in result.stdout and "1 epochs done" in result.stdout
    again = newest(folder)
    assert_same_state(expected, again)
    assert logged(folder) == logged(tmp_path / "whole")


def test_restarts_without_resume_are_refused_at_once(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert train(images, tmp_path / "run") == 2
    assert "--resume auto" in capsys.readouterr().err
