"""run_with_submitit.py, with and without a real SLURM of two virtual nodes (slurm/cluster.py).

Also of config/job.py.
"""

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import holding
import pytest
import yaml
from runs import PATIENCE, ROOT, assert_equal, newest

import main
import run_with_submitit
from checkpointing.files import load_checkpoint
from checkpointing.folder import checkpoints_in
from errors import Stopped, UserError
from tests.slurm.cluster import Cluster, missing

RUN = (
    *("--data-set", "DIGITS", "--model", "deit_nano_patch4_32", "--input-size", "8"),
    *("--batch-size", "64", "--num-workers", "0", "--epochs", "3", "--warmup-epochs", "1"),
    *("--aa", "none", "--no-repeated-aug", "--no-tensorboard", "--lr", "0.01", "--device", "cpu"),
)
UPDATES = 11  # of an epoch of RUN, by two processes
CPU_NODES = ("--ngpus", "0", "--cpus-per-task", "2")
# SLURM's signals reach the workers too.
WORKER = ("--num-workers", "1")
needs_slurm = pytest.mark.skipif(bool(missing()), reason=f"SLURM: {missing()}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not below pytest's folders, which only their owner may enter: munged insists.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = Cluster(Path(folder))
        cluster.env["OMP_NUM_THREADS"] = "1"
        cluster.start()
        yield cluster
        cluster.stop()


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory) -> dict:
    """The last checkpoint of RUN on one node with two tasks, which see two (pretended) GPUs."""
    shared = tmp_path_factory.mktemp("one-node")
    options = ("--nodes", "1", "--ngpus", "2", "--cpus-per-task", "2", "--follow")
    code, shown = launch(cluster, "--shared-dir", str(shared), *options, *RUN)
    assert code == 0, shown
    assert "1 node(s) × 2 process(es)" in shown
    assert "64 × 2 process(es)" in shown and "epoch 3/3" in shown
    assert "Traceback" not in shown
    return newest(output(shown))


@pytest.fixture(scope="module")
def array(cluster, tmp_path_factory) -> str:
    """What was said when two runs, of seeds 3 and 4, were submitted as an array."""
    folder = tmp_path_factory.mktemp("array")
    for seed in (3, 4):
        (folder / f"{seed}.yaml").write_text(f"seed: {seed}\n")
    files = (str(folder / "3.yaml"), str(folder / "4.yaml"))
    options = ("--array-of-configs", *files, "--job-dir", str(folder / "logs"), *CPU_NODES)
    code, shown = launch(cluster, *options, *RUN, "--epochs", "2")
    assert code == 0, shown
    return shown


def launch(cluster: Cluster, *argv: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of run_with_submitit.py; the job gets ``environment`` too."""
    shown = io.StringIO()
    with (
        mock.patch.dict(os.environ, cluster.env | environment),
        mock.patch.object(run_with_submitit, "POLL_SECONDS", 0.2),
        contextlib.redirect_stdout(shown),
        contextlib.redirect_stderr(shown),
    ):
        code = run_with_submitit.main(argv)
    return code, shown.getvalue()


def said(what: str, shown: str) -> list[str]:
    return re.findall(rf"^{what} +(\S+?):?(?: |$)", shown, re.M)


def output(shown: str) -> Path:
    return Path(said("output", shown)[0])


def wait_until(true: Callable[[], object], what: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def has_ended(cluster: Cluster, job: str) -> bool:
    return cluster.show(job)["JobState"] in (*run_with_submitit.FAILED, "COMPLETED")


def wait_for_end(cluster: Cluster, job: str) -> dict[str, str]:
    wait_until(lambda: has_ended(cluster, job), lambda: cluster.show(job))
    return cluster.show(job)


def wait_for_hold(cluster: Cluster, shown: str, marks: Path, number: int) -> None:
    """Until the job is held for the ``number``-th time; a failure as soon as it has ended."""
    [job] = said("job", shown)
    holding.wait_for_hold(marks, number, lambda: has_ended(cluster, job), lambda: logs(shown))


def logs(shown: str) -> str:
    """What the job wrote, main process and batch script, errors too."""
    files = [Path(said(name, shown)[0]) for name in ("log", "errors")]
    return "".join(file.read_text() for file in files if file.exists())


# --- on the cluster -------------------------------------------------------------------------------


@needs_slurm
def test_two_nodes_requeued_twice_end_with_the_weights_of_the_undisturbed_run(
    cluster, undisturbed, tmp_path, request
):
    """One task per node; requeued after SLURM's warning, then by an administrator."""
    options = ("--nodes", "2", "--shared-dir", str(tmp_path), *CPU_NODES, *holding.OPTIONS)
    # Three steps into the second epoch, and into the third.
    held = holding.variables(tmp_path, UPDATES + 3, UPDATES)
    code, shown = launch(cluster, *options, *RUN, *WORKER, **held)
    assert code == 0, shown
    [job] = said("job", shown)
    folder = output(shown)
    assert folder == tmp_path / "jobs" / job / "output"
    wait_for_hold(cluster, shown, tmp_path, 0)
    cluster.run("scancel", "--signal=USR2", job)
    request.getfixturevalue("array")  # has the machine while this job waits for its turn
    wait_for_hold(cluster, shown, tmp_path, 1)
    cluster.run("scontrol", "requeue", job)
    state = wait_for_end(cluster, job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "2"), logs(shown)
    assert state["NumNodes"] == "2"
    text = logs(shown)
    assert "stopped by signal" in text and "requeued: the job goes on" in text
    assert len(re.findall(r"^resumed ", text, re.M)) == 2
    assert "Traceback" not in text
    epochs = re.findall(r'"epoch": (\d+)', (folder / "log.txt").read_text())
    assert epochs == ["1", "2", "3"]
    for part in ("model", "model_ema"):
        assert_equal(newest(folder)[part], undisturbed[part], part)


@needs_slurm
def test_array_of_two_configs(cluster, array):
    shown = array
    jobs, folders = said("job", shown), [Path(folder) for folder in said("output", shown)]
    assert [job.rpartition("_")[2] for job in jobs] == ["0", "1"]
    for job, folder, seed in zip(jobs, folders, (3, 4), strict=True):
        assert wait_for_end(cluster, job)["JobState"] == "COMPLETED", logs(shown)
        assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == seed
        assert newest(folder)["progress"]["epoch"] == 2


@needs_slurm
def test_scancel_leaves_a_checkpoint_and_ends_the_job(cluster, tmp_path):
    options = ("--nodes", "2", "--job-dir", str(tmp_path), *CPU_NODES, *holding.OPTIONS)
    held = holding.variables(tmp_path, UPDATES + 3)
    code, shown = launch(cluster, *options, *RUN, *WORKER, **held)
    assert code == 0, shown
    [job] = said("job", shown)
    wait_for_hold(cluster, shown, tmp_path, 0)
    cluster.run("scancel", job)
    state = wait_for_end(cluster, job)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0")
    wait_until(lambda: not cluster.run("squeue", "--noheader", "-j", job), lambda: logs(shown))
    saved = Path(re.search(r"saved (\S+)", logs(shown))[1])
    assert saved == checkpoints_in(output(shown))[0]
    assert load_checkpoint(saved)["progress"]["update"] == UPDATES + 3


@needs_slurm
def test_error_of_a_job_is_shown(cluster, tmp_path):
    options = ("--shared-dir", str(tmp_path), *CPU_NODES, "--follow")
    code, shown = launch(cluster, *options, *RUN, "--data-set", "IMNET", "--data-path", "/nowhere")
    assert code == 2
    assert re.search(r"^error: .*/nowhere", shown, re.M), shown
    assert re.search(r"^job \d+ ended with exit code 2$", shown, re.M)
    assert "Traceback" not in shown


@needs_slurm
def test_refusal_of_slurm_is_one_line(cluster, tmp_path):
    options = ("--shared-dir", str(tmp_path), "--partition", "gold", *CPU_NODES)
    code, shown = launch(cluster, *options, *RUN)
    assert code == 2
    assert re.search(r"^error: SLURM refused the job: .*partition.*\n\Z", shown, re.M), shown
    assert "Traceback" not in shown


# --- without one ----------------------------------------------------------------------------------


def test_local_executor(tmp_path):
    argv = ["--local", "--shared-dir", str(tmp_path), *CPU_NODES, *RUN]
    done = subprocess.run(
        [sys.executable, ROOT / "run_with_submitit.py", *argv, "--epochs", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "64 × 1 process(es)" in done.stdout and "epoch 2/2" in done.stdout
    assert newest(output(done.stdout))["progress"]["epoch"] == 2


def test_a_process_that_storage_holds_leaves_as_one_that_stopped(monkeypatch, capsys):
    """So that the job is requeued; submitit makes an error of anything that is raised."""
    environment = mock.Mock(USR_SIG="USR2", global_rank=0, job_id="7")
    monkeypatch.setattr("submitit.JobEnvironment", lambda: environment)
    monkeypatch.setattr("submitit.helpers.TorchDistributedEnvironment", mock.Mock())
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    requeue = mock.Mock()
    monkeypatch.setattr(signal, "getsignal", lambda _: requeue)
    monkeypatch.setattr(signal, "signal", mock.Mock())
    stopped = mock.Mock(side_effect=Stopped(signal.SIGUSR2, alone=True))
    monkeypatch.setattr("training.run.run", stopped)
    [config] = run_with_submitit.load([*RUN, "--job-dir", "jobs"])[1]
    with pytest.raises(SystemExit) as ended:
        run_with_submitit.TrainingJob(config)()
    assert ended.value.code == 128 + signal.SIGUSR2
    requeue.assert_called_once_with(signal.SIGUSR2, None)
    assert "stopped by signal" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--nodez", "2"], "unknown option --nodez; did you mean --nodes?"),
        (["--model-emma"], "unknown option --model-emma; did you mean --model-ema?"),
        (["--nodes", "0"], "--nodes: must be at least 1, got 0"),
        (["--ngpus", "2", "--tasks-per-node", "3"], "--tasks-per-node: 3, but a GPU has one"),
        (["--ngpus", "0", "--device", "cuda"], "--ngpus: 0, but --device cuda"),
        (["--timeout", "2", "--warning", "120"], "--warning: 120 seconds before the end"),
        (["--local", "--nodes", "2"], "--local: is one machine"),
        (["--array-of-configs", "a.yaml", "b.yaml", "--config", "c.yaml"], "--config: and"),
        (["--array-of-configs", "a.yaml", "b.yaml", "--output-dir", "x"], "--output-dir: would be"),
        (["--array-of-configs", "nowhere.yaml"], "--config: nowhere.yaml does not exist"),
        ([], "--shared-dir: name a folder that all nodes see (or set TRAIN_SHARED_DIR)"),
    ],
)
def test_bad_input_is_one_line(argv, message, capsys, monkeypatch):
    monkeypatch.delenv(run_with_submitit.SHARED_DIR, raising=False)
    assert run_with_submitit.main(argv) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}") and shown.count("\n") == 1


def test_folder_with_another_run_is_refused_before_submission(tmp_path, capsys):
    (tmp_path / "log.txt").touch()
    argv = ["--shared-dir", str(tmp_path), "--output-dir", str(tmp_path)]
    assert run_with_submitit.main(argv) == 2
    assert "already holds a run: add --resume auto" in capsys.readouterr().err


def test_shared_folder_comes_from_the_option_or_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv(run_with_submitit.SHARED_DIR, str(tmp_path / "env"))
    job, [config] = run_with_submitit.load([])
    assert config.run.output_dir == str(tmp_path / "env" / "jobs" / "%j" / "output")
    _, [config] = run_with_submitit.load(["--shared_dir", str(tmp_path / "option")])
    assert config.run.output_dir == str(tmp_path / "option" / "jobs" / "%j" / "output")
    _, [config] = run_with_submitit.load(["--job-dir", str(tmp_path)])
    assert config.run.output_dir == str(tmp_path / "output-%j")


def test_without_slurm_the_error_names_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    job, [config] = run_with_submitit.load(["--shared-dir", str(tmp_path)])
    with pytest.raises(UserError, match="no sbatch here: .*--local"):
        run_with_submitit.build_executor(job, config)


def test_help_and_errors_do_not_import_torch():
    code = "import sys, run_with_submitit as r; r.main(['--nodez']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_help_has_every_option_of_main():
    ours, theirs = (
        set(re.findall(r"--[a-z][\w-]*", parser.format_help()))
        for parser in (run_with_submitit.get_args_parser(), main.get_args_parser())
    )
    assert len(theirs) > 100
    assert theirs < ours and {"--nodes", "--ngpus"} <= ours - theirs


def test_commands_of_the_documents_are_accepted(monkeypatch, tmp_path):
    monkeypatch.setenv(run_with_submitit.SHARED_DIR, str(tmp_path))
    monkeypatch.chdir(ROOT)
    text = "".join(path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
    commands = re.findall(r"^python run_with_submitit\.py (.*)", text.replace("\\\n", " "), re.M)
    assert commands
    for command in commands:
        run_with_submitit.load(shlex.split(command))
