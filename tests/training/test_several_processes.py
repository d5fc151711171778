"""Runs of several processes: the same as one process of as many images, whoever starts them."""

import re

import pytest
from runs import (
    PATIENCE,
    PLAIN,
    arguments,
    assert_close,
    fork_process,
    logged,
    newest,
    start_process,
    train,
    train_together,
)

import main
from tools.torture.processes import free_port

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SGD = (*PLAIN, "--epochs", "2", "--opt", "sgd", "--no-model-ema")


def assert_same_run(one, two) -> None:
    """The folders of two runs hold the same weights and scores, to rounding."""
    assert_close(newest(one), newest(two))
    for left, right in zip(logged(one), logged(two), strict=True):
        assert left["test_acc1"] == right["test_acc1"]
        assert left["train_acc1"] == right["train_acc1"]
        assert left["train_loss"] == pytest.approx(right["train_loss"], rel=1e-5)
        assert left["train_lr"] == right["train_lr"]


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    """The folder of a run of one process with batches of 8, without draws for a whole batch."""
    folder = tmp_path_factory.mktemp("alone")
    assert train(images, folder, *SGD, "--batch-size", "8") == 0
    return folder


# --- launchers ----------------------------------------------------------------------------------


def test_torchrun_with_two_processes_equals_one_of_twice_the_batch(images, alone, tmp_path):
    process = start_process(arguments(images, tmp_path, *SGD, "--distributed"), TORCHRUN)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert "8 = 4 × 2 process(es)" in output
    assert output.count("learning rate") == 1  # one process speaks
    assert_same_run(alone, tmp_path)


def slurm_variables(rank: int, **more: str) -> dict[str, str]:
    """What SLURM sets for a task of two on one node."""
    variables = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    return variables | {"SLURM_LOCALID": str(rank), "SLURM_JOB_ID": "77"} | more


def test_two_tasks_of_slurm_meet_by_its_variables(images, alone, tmp_path):
    port = str(free_port())
    argv = arguments(images, tmp_path, *SGD)
    tasks = [
        fork_process(argv, **slurm_variables(rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
        for rank in range(2)
    ]
    outputs = [task.communicate(timeout=PATIENCE)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "8 = 4 × 2 process(es)" in outputs[0] and outputs[1] == ""
    assert_same_run(alone, tmp_path)


def test_tasks_of_slurm_without_an_address_are_an_error(images, tmp_path, monkeypatch, capsys):
    for name, value in slurm_variables(1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert train(images, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --dist-url: ") and error.count("\n") == 1
    assert "MASTER_ADDR is not set" in error and "tcp://HOST:PORT" in error
    assert not (tmp_path / "run").exists()


def test_one_task_of_slurm_trains_alone(images, tmp_path, monkeypatch, capsys):
    for name, value in slurm_variables(0, SLURM_NTASKS="1").items():
        monkeypatch.setenv(name, value)
    assert train(images, tmp_path, "--epochs", "1", "--warmup-epochs", "0") == 0
    assert "4 = 4 × 1 process(es)" in capsys.readouterr().out


# --- what the processes share -------------------------------------------------------------------


def test_the_batch_statistics_that_are_evaluated_are_those_that_are_saved(images, tmp_path, capsys):
    """Each process gathers statistics of its own; what is logged must be what is saved."""
    options = ("--model", "modern_lenet", "--input-size", "16", "--epochs", "2")
    train_together(images, tmp_path / "run", *options)
    record = logged(tmp_path / "run")[-1]
    assert main.main(["--eval", "--resume", str(tmp_path / "run" / "checkpoint-0002.pth")]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"model .*loss {record['test_loss']:.4f}", shown), (record, shown)
    assert re.search(rf"EMA .*loss {record['ema_loss']:.4f}", shown), (record, shown)
