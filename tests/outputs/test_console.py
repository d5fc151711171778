"""Standard output and error: whatever becomes of them, a program goes on to its end."""

import io
import logging
import os
import subprocess
import sys

import pytest
from disks import fill, small_disk
from runs import ROOT, arguments, newest

from config import load
from outputs.console import console, each_message_once, say, show_messages


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of bash, in which $PY is this Python."""
    env = os.environ | {"PY": sys.executable} | environment
    env.pop("PYTHONUNBUFFERED", None)
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, errors="replace"
    )


# --- characters -----------------------------------------------------------------------------------


def printed(text: str, encoding: str, monkeypatch) -> bytes:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="strict"))
    with console():
        print(text, end="")
    return raw.getvalue()


def test_what_a_console_cannot_show_is_replaced(monkeypatch):
    name = os.fsdecode(b"caf\xe9")  # not UTF-8
    assert printed("2×3 …", "ascii", monkeypatch) == b"2x3 ..."
    assert printed("2×3 …", "latin-1", monkeypatch) == "2×3 ...".encode("latin-1")
    assert printed("2×3 …", "utf-8", monkeypatch) == "2×3 …".encode()
    assert printed("猫", "cp1252", monkeypatch) == b"\\u732b"
    assert printed("猫 ₖ", "gbk", monkeypatch) == "猫 ".encode("gbk") + b"\\u2096"
    for encoding in ("ascii", "latin-1", "utf-8", "gbk"):
        assert printed(name, encoding, monkeypatch) == b"caf\\xe9"


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1", "cp1252", "gbk", "utf-8"])
def test_help_and_options_on_consoles_of_each_encoding(encoding):
    run = shell("$PY main.py --help && $PY main.py --print-config", PYTHONIOENCODING=encoding)
    assert run.returncode == 0, run.stderr
    assert "--warmup-epochs" in run.stdout  # of --help
    assert "\nwarmup_epochs: " in run.stdout  # of --print-config


def test_a_path_that_is_not_utf8(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    command = [sys.executable, "main.py", "--data-path", folder, "--print-config"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert run.returncode == 0, run.stderr
    (tmp_path / "c.yaml").write_bytes(run.stdout)
    assert load(["--config", str(tmp_path / "c.yaml")]).data.data_path == folder


# --- streams that fail ----------------------------------------------------------------------------


LOOP = """
import sys
from outputs.console import console
with console():
    for number in range(20000):
        print("line", number, flush=number % 100 == 0)
    print("to the end", file=sys.stderr)
open(sys.argv[1], "w").write("done")
sys.exit(7)
"""


@pytest.mark.parametrize(
    "redirection, said",
    [
        ("| head -1 >/dev/null", "warning: standard output: its reader left"),
        (">&-", ""),
        ("2>&-", ""),
        (">&- 2>&-", ""),
        ("<&- >&- 2>&-", ""),
        (">/dev/full", "warning: standard output: No space left on device"),
        (">/dev/full 2>/dev/full", ""),
        ("2>&1 | head -1 >/dev/null", ""),
    ],
)
def test_a_program_goes_on_to_its_end(tmp_path, redirection, said):
    """Its exit code is its own, too: not the 120 of an interpreter that can't flush."""
    done = tmp_path / "done"
    run = shell(
        f'($PY -c "$CODE" {done}; echo $? >{tmp_path}/code) {redirection}',
        CODE=LOOP,
    )
    assert done.read_text() == "done", run.stderr
    assert (tmp_path / "code").read_text() == "7\n", run.stderr
    if said:
        assert run.stderr.count(said) == 1 and "to the end" in run.stderr
    assert "Exception" not in run.stderr and "Traceback" not in run.stderr


def test_a_closed_stream_is_no_file_of_the_program(tmp_path):
    """A file opened later would get the number 1, and what C libraries print with it."""
    code = "from outputs.console import console; import os\nwith console():\n"
    code += (
        f"  f = open({str(tmp_path / 'x')!r}, 'w'); os.write(1, b'noise'); os.write(2, b'noise')"
    )
    assert shell('$PY -c "$CODE" >&- 2>&-', CODE=code).returncode == 0
    assert (tmp_path / "x").read_text() == ""


def test_a_file_that_has_room_again_is_written_again(tmp_path, monkeypatch, capsys):
    with small_disk(tmp_path / "disk", 64) as disk:
        with open(disk / "out.txt", "w", encoding="utf-8") as file:
            filler = fill(disk)
            monkeypatch.setattr(sys, "stdout", file)
            with console():
                for number in range(1000):
                    print("line", number, flush=True)
                filler.unlink()
                print("the last", flush=True)
        text = (disk / "out.txt").read_text()
    assert text.startswith("line 0\n") and "the last\n" in text
    assert text.count("can be written again") == 1
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_a_reader_ends_a_program_that_only_prints():
    code = LOOP.replace("console()", "console(reader_ends=True)")
    run = shell('$PY -c "$CODE" /dev/null | head -1', CODE=code)
    assert run.stdout == "line 0\n" and "to the end" not in run.stderr


# --- trainings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["closed", "left", "ascii"])
def test_a_training_goes_on_to_its_end(images, tmp_path, stream):
    argv = arguments(images, tmp_path / "run", "--epochs", "1", "--warmup-epochs", "0")
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(_main_on(stream, argv))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert newest(tmp_path / "run")["progress"]["epoch"] == 1


def _main_on(stream: str, argv: list[str]) -> int:
    """main.main with a standard output of that kind."""
    import main

    if stream == "left":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    encoding = "ascii" if stream == "ascii" else "utf-8"
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    if stream == "closed":
        os.close(1)
        sys.stdout = None
    return main.main(argv)


# --- a host's own ---------------------------------------------------------------------------------


def test_the_hosts_handlers_levels_and_streams_stay(capsys):
    root, quiet = logging.getLogger(), logging.getLogger("timm")
    host = logging.StreamHandler(io.StringIO())
    root.addHandler(host)
    root.setLevel(logging.DEBUG)
    quiet.setLevel(logging.ERROR)
    before = list(root.handlers), sys.stdout, sys.stderr
    try:
        with pytest.raises(KeyError), console():
            show_messages(logging.Formatter("%(message)s"), logging.INFO)
            assert host in root.handlers
            logging.info("a message")
            with console():  # as a tool that trains
                show_messages(logging.Formatter("%(message)s"), logging.INFO)
                logging.info("another")
            raise KeyError
        assert (list(root.handlers), sys.stdout, sys.stderr) == before
        assert root.level == logging.DEBUG and quiet.level == logging.ERROR
    finally:
        root.removeHandler(host)
    assert host.stream.getvalue() == "a message\nanother\n"
    assert capsys.readouterr().out == "a message\nanother\n"


def test_a_run_that_fails_leaves_no_handler(tmp_path):
    import main

    before = list(logging.getLogger().handlers), logging.getLogger().level
    assert main.main(["--data-path", str(tmp_path / "none"), "--device", "cpu"]) == 2
    assert (list(logging.getLogger().handlers), logging.getLogger().level) == before


# --- commands of terminals ------------------------------------------------------------------------


NASTY = "a\x1b[31m\x07\x9b2J\b\r\u202eb\u2066\u200b\u2028\x7f\ud800"
SHOWN = r"a\x1b[31m\x07\x9b2J\x08\r\u202eb\u2066\u200b\u2028\x7f\ud800"  # each as Python writes it


def test_only_a_bar_commands_the_terminal(capsys):
    with console():
        print(f"{NASTY}\n\tsecond line", file=sys.stderr)
        sys.stderr.write("\r50%|##  | of \x1b[2Jnames")  # as tqdm draws
        sys.stderr.write("\n\x1b[A")  # from bar to bar
        sys.stderr.write("\r      \r")
        say(f"{NASTY}\nnot a line of its own")
        say("a failure", error=True)
    captured = capsys.readouterr()
    bars = "\r50%|##  | of \\x1b[2Jnames\n\x1b[A\r      \r"
    assert captured.err == f"{SHOWN}\n\tsecond line\n{bars}a failure\n"
    assert captured.out == f"{SHOWN}\\nnot a line of its own\n"


def test_a_message_is_one_line(capsys):
    with console():
        show_messages(logging.Formatter("%(levelname)s: %(message)s"), logging.INFO)
        logging.getLogger("names").info("class %s", "a\nERROR: the disk is gone\x1b[2J")
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logging.getLogger("names").exception("why")
    out = capsys.readouterr().out
    assert out.startswith("INFO: class a\\nERROR: the disk is gone\\x1b[2J\nERROR: why\nTraceback ")
    assert "ValueError: two\nlines" in out


def test_what_is_done_twice_tells_it_once(capsys):
    with console():
        show_messages(logging.Formatter("%(message)s"), logging.INFO)
        log = logging.getLogger("twice")
        with each_message_once():
            for number in (1, 2, 1):
                log.info("number %d", number)
        log.info("number %d", 1)
    assert capsys.readouterr().out.split("\n") == ["number 1", "number 2", "number 1", ""]
