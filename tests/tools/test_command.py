"""What the tools share: errors in one line, exit codes, output that may fail."""

import argparse
import errno
import os
import subprocess
import sys

import pytest
from disks import fill, small_disk
from PIL import Image
from runs import ROOT

from errors import UserError
from tools.common import command


def outcome(action, capsys) -> tuple[int, str]:
    code = command.run(lambda _: action(), argparse.ArgumentParser(), [])
    return code, capsys.readouterr().err


def test_an_error_of_the_system_that_nobody_foresaw_is_one_line(tmp_path, capsys):
    missing = tmp_path / "missing"
    code, shown = outcome(missing.read_text, capsys)
    assert code == 2 and shown.count("\n") == 1
    assert shown.startswith(f"error: {missing}: No such file or directory (")
    for number in (errno.EACCES, errno.ENOSPC, errno.EROFS, errno.EMFILE, errno.EDQUOT):

        def fail(number: int = number) -> None:
            raise OSError(number, os.strerror(number), "/some/where")

        code, shown = outcome(fail, capsys)
        assert code == 2 and shown.startswith(f"error: /some/where: {os.strerror(number)} (")


def test_a_fault_of_the_program_keeps_its_traceback(capsys):
    def fail() -> None:
        raise OSError("no number: nothing of the system's")

    with pytest.raises(OSError, match="no number"):
        outcome(fail, capsys)


def test_a_text_that_has_no_room(tmp_path):
    with small_disk(tmp_path / "disk", 64) as disk:
        fill(disk)
        with pytest.raises(UserError, match="not written: .*a.txt: No space left on device"):
            command.write_text(disk / "run" / "a.txt", "text")
        assert list((disk / "run").iterdir()) == []


def test_a_chart_that_has_no_room_leaves_nothing(tmp_path):
    """And the one that was there before stays."""
    with small_disk(tmp_path / "disk", 64) as disk:
        path = disk / "new" / "chart.png"
        with command.written(path) as temporary:
            temporary.write_bytes(b"before")
        no_room = pytest.raises(UserError, match=f"not written: .*{path}.*No space")
        with no_room, command.written(path) as temporary:
            Image.effect_noise((300, 300), 60).save(temporary)
        assert [each.name for each in path.parent.iterdir()] == ["chart.png"]
        assert path.read_bytes() == b"before"


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "cp1252", "gbk"])
@pytest.mark.parametrize("tool", ["tools.data", "run_with_submitit"])
def test_help_on_consoles_of_each_encoding(tool, encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    run = subprocess.run(
        [sys.executable, "-m", tool, "--help"], cwd=ROOT, env=environment, capture_output=True
    )
    assert run.returncode == 0 and b"usage" in run.stdout, run.stderr


def test_a_tool_that_prints_fails_with_its_output(capsys, monkeypatch):
    for reader_ends in (True, False):
        with open("/dev/full", "w", encoding="utf-8") as full:
            monkeypatch.setattr(sys, "stdout", full)
            code = command.run(
                lambda _: print("cat 0.9"), argparse.ArgumentParser(), [], reader_ends=reader_ends
            )
        assert code == reader_ends
        assert capsys.readouterr().err.count("standard output: No space left on device") == 1


def test_a_tool_whose_reader_left_goes_on(tmp_path):
    """Only one that prints and does nothing else ends at once."""
    code = (
        "import argparse, pathlib, sys\nfrom tools.common import command\n"
        "def work(_):\n    for i in range(9999): print(i, flush=True)\n"
        f"    pathlib.Path({str(tmp_path / 'done')!r}).touch()\n"
        "sys.exit(command.run(work, argparse.ArgumentParser(), [], reader_ends=len(sys.argv) > 1))"
    )
    (tmp_path / "tool.py").write_text(code)
    tool = f"{sys.executable} {tmp_path / 'tool.py'}"
    for arguments, ends in (("", False), ("x", True)):
        (tmp_path / "done").unlink(missing_ok=True)
        run = subprocess.run(
            ["bash", "-c", f"{tool} {arguments} | head -1; echo $PIPESTATUS"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert run.stdout == "0\n0\n", run.stderr
        assert (tmp_path / "done").exists() != ends
