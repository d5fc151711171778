"""The command line as a process: help and errors at once, before torch is imported."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from disks import read_only, small_disk

import main
from config import all_options, load
from errors import DivergedError

ROOT = Path(__file__).resolve().parent.parent


def python(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)


def test_help_lists_everything_without_heavy_imports():
    code = (
        "import sys, config, main\n"
        "try:\n"
        "    main.main(['--help'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = {'torch', 'torchvision', 'timm', 'numpy', 'PIL', 'matplotlib', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    run = python("-c", code)
    assert run.returncode == 0, run.stderr
    for opt in all_options():
        assert opt.flag in run.stdout
        assert opt.title in run.stdout


@pytest.mark.parametrize(
    ("given", "tries"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_threads_that_wait_leave_their_core_soon(given, tries):
    """As torch's library for threads says itself when it is loaded."""
    code = "import main; main.main(['--print-config']); import torch"
    kept = {n: v for n, v in os.environ.items() if n not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=kept | given | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    if "GOMP_" not in run.stderr:
        pytest.skip("torch is built with another OpenMP than GNU's")
    assert f"GOMP_SPINCOUNT = '{tries}'" in run.stderr


def test_misspelled_option_is_one_line_and_code_2():
    run = python("-X", "importtime", "main.py", "--epoch", "3")
    lines = [line for line in run.stderr.splitlines() if not line.startswith("import time:")]
    assert run.returncode == 2
    assert lines == ["error: unknown option --epoch; did you mean --epochs?"]
    assert "torch" not in run.stderr


def test_print_config_prints_what_config_takes(tmp_path):
    run = python("main.py", "--lr", "1e-3", "--amp", "off", "--print-config")
    assert run.returncode == 0, run.stderr
    path = tmp_path / "c.yaml"
    path.write_text(run.stdout, encoding="utf-8")
    again = load(["--config", str(path)])
    assert again.recipe() == load(["--lr", "1e-3", "--amp", "off"]).recipe()


def test_print_config_names_origins(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("lr: 1e-3\n")
    argv = ["--config", str(tmp_path / "mine.yaml"), "--epochs", "7", "--print-config"]
    assert main.main(argv) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^lr: 0.001 +# .*mine.yaml$", shown, re.M)
    assert re.search(r"^epochs: 7 +# command line$", shown, re.M)
    assert re.search(r"^batch_size: 64 +# default$", shown, re.M)


def test_each_kind_of_end_has_its_exit_code(monkeypatch, capsys):
    """An error of the user's has its own code and one line; Ctrl-C is 130."""
    outcomes = {"error": DivergedError("no finite loss"), "interrupt": KeyboardInterrupt()}

    def run(config) -> int:
        if config.run.output_dir in outcomes:
            raise outcomes[config.run.output_dir]
        return 17

    monkeypatch.setattr("training.run.run", run)
    assert main.main(["--output-dir", "fine"]) == 17
    assert main.main(["--output-dir", "error"]) == 3
    assert capsys.readouterr().err == "error: no finite loss\n"
    assert main.main(["--output-dir", "interrupt"]) == 130
    assert "nothing to save" in capsys.readouterr().err


def test_an_error_of_the_system_that_nobody_foresaw_is_one_line(monkeypatch, capsys):
    def run(config) -> int:
        raise OSError(errno.EMFILE, "Too many open files", "/some/where")

    monkeypatch.setattr("training.run.run", run)
    assert main.main([]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: /some/where: Too many open files (") and shown.count("\n") == 1
    assert "ulimit -n" in shown


@pytest.mark.parametrize(
    "place, why",
    [
        ("file", "a file of that name is in the way"),
        ("file/run", "a part of this path is a file, not a folder"),
        ("n" * 300, "give a shorter name"),
        ("disk/run", "this file system is read-only"),
    ],
)
def test_an_output_folder_that_cannot_be_had_is_one_line(images, tmp_path, capsys, place, why):
    (tmp_path / "file").write_text("")
    with small_disk(tmp_path / "disk", 64) as disk:
        read_only(disk)
        argv = ["--data-path", str(images), "--output-dir", str(tmp_path / place)]
        assert main.main([*argv, "--device", "cpu"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: --output-dir: not writable: ") and shown.count("\n") == 1
    assert why in shown


def test_print_config_shows_what_was_given_where_weights_are_missing(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("finetune: 12:30:45\nmodel: 0x1F\nbatch_size: 064\n")
    assert main.main(["--config", str(tmp_path / "c.yaml"), "--print-config"]) == 2
    output = capsys.readouterr()
    for line in ("finetune: '12:30:45' ", "model: '0x1F' ", "batch_size: 64 "):
        assert f"\n{line}" in output.out
    assert output.err == "error: checkpoint 12:30:45 does not exist\n"
