"""bounded.py: regular files of a stated size, and nothing else."""

import os
import socket
from contextlib import chdir

import pytest

import bounded


@pytest.mark.parametrize("size", [0, 1, 9, 10])
def test_a_file_up_to_the_limit_is_read_whole(tmp_path, size):
    path = tmp_path / "a"
    path.write_bytes(b"x" * size)
    assert bounded.read_bytes(path, 10) == b"x" * size
    with bounded.opened(path, 10) as file:
        assert file.read() == b"x" * size


def test_a_longer_file_is_not_opened(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 11)
    monkeypatch.setattr(os, "open", lambda *a: pytest.fail("opened"))
    with pytest.raises(OSError, match="11 bytes, and no more than 10 bytes is read"):
        bounded.read_bytes(path, 10)


def test_a_file_that_grows_is_cut_at_the_limit(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 30)
    before = os.stat(path)

    def then_more(_: int) -> os.stat_result:
        path.write_bytes(b"x" * 50)
        return before

    monkeypatch.setattr(os, "fstat", then_more)
    with pytest.raises(OSError, match="more than 40 bytes"):
        bounded.read_bytes(path, 40)


def test_what_says_nothing_of_its_size_is_read_up_to_the_limit():
    assert os.stat("/proc/self/status").st_size == 0
    assert b"Pid:" in bounded.read_bytes("/proc/self/status", 1 << 20)
    with pytest.raises(OSError, match="more than 10 bytes"):
        bounded.read_bytes("/proc/self/status", 10)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening, chdir(tmp_path):
        listening.bind("socket")
    kinds = {
        "pipe": "a named pipe",
        "socket": "a socket",
        "/dev/zero": "a device",
        ".": "directory",
    }
    for name, kind in kinds.items():
        with pytest.raises(OSError, match=kind):
            bounded.read_bytes(tmp_path / name, 10)
    with pytest.raises(FileNotFoundError):
        bounded.read_bytes(tmp_path / "b", 10)
    with pytest.raises(OSError, match="a NUL"):
        bounded.read_bytes("a\0b", 10)


def test_text_and_json(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"\xef\xbb\xbf[1, 2]")
    assert bounded.read_text(path, 100) == "[1, 2]" and bounded.read_json(path, 100) == [1, 2]
    for text in ("[" * 100_000, "1" * 5000, "{", b"\xff"):
        with pytest.raises(ValueError):
            bounded.parse_json(text)


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (10 << 20, "10 MiB"),
        (1 << 30, "1 GiB"),
    ],
)
def test_sizes_for_people(count, text):
    assert bounded.size_text(count) == text


def test_a_pipe_is_read_up_to_the_limit():
    reader, writer = os.pipe()
    os.write(writer, b"12345")
    with pytest.raises(OSError, match="more than 4 bytes came"):
        bounded.read_pipe(f"/dev/fd/{reader}", 4)
    os.close(writer)
    os.close(reader)
