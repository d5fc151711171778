"""Files that may fail to be written, on a disk that is full, gone or read-only."""

import errno
import io
import shutil

import pytest
import torch
from disks import fill, read_only, small_disk

from outputs.files import Outputs, as_os_error, check_writable


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def test_a_full_disk_is_said_once_and_what_failed_is_written_later(tmp_path, caplog):
    caplog.set_level("INFO")
    outputs = Outputs()
    with small_disk(tmp_path / "disk", 64) as disk:
        filler = fill(disk)
        path, other = disk / "run" / "a.txt", disk / "run" / "b.txt"
        for text in ("first", "second"):
            assert not outputs.write(path, lambda p, text=text: p.write_text(text))
        assert not outputs.write(other, lambda p: p.write_text("other"))
        outputs.retry()
        assert len(warnings(caplog)) == 2
        assert warnings(caplog)[0].startswith(f"not written: {path}: No space left on device (free")
        filler.unlink()
        outputs.retry()
        assert path.read_text() == "second" and other.read_text() == "other"
        assert f"{path} can be written again" in caplog.messages
        path.unlink()
        outputs.retry()  # nothing waits any more
        assert not path.exists()
        fill(disk)
        outputs.write(path, lambda p: p.write_text("third"))
        outputs.close()
        assert len(warnings(caplog)) == 4  # another failure, and what is missing in the end
        assert warnings(caplog)[-1] == f"still not written: {path}"


def test_a_folder_that_vanished_is_made_again(tmp_path):
    outputs = Outputs()
    path = tmp_path / "run" / "a.txt"
    assert outputs.write(path, lambda p: p.write_text("1"))
    shutil.rmtree(tmp_path / "run")
    assert outputs.write(path, lambda p: p.write_text("2"))
    assert path.read_text() == "2"


@pytest.mark.parametrize(
    "place, why",
    [
        ("file/run/a.txt", "a part of this path is a file"),
        ("n" * 300 + "/a.txt", "give a shorter name"),
        ("ro/a.txt", "this file system is read-only"),
        ("folder", "this is a folder"),
    ],
)
def test_each_kind_of_refusal_says_what_helps(tmp_path, caplog, place, why):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with small_disk(tmp_path / "ro", 64) as disk:
        read_only(disk)
        assert not Outputs().write(tmp_path / place, lambda p: p.write_text("x"))
    assert why in warnings(caplog)[0] and place in warnings(caplog)[0]


def test_errors_of_torch_that_are_the_disks(tmp_path):
    """torch.save on a real full disk: what it raises is the file system's error again."""
    with small_disk(tmp_path / "disk", 64) as disk:
        fill(disk, leave=8192)
        with pytest.raises(RuntimeError) as raised, open(disk / "x.pth", "wb") as file:
            torch.save({"w": torch.zeros(100_000)}, file)
        assert as_os_error(raised.value, disk / "x.pth").errno == errno.ENOSPC
        bare = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2")
        assert as_os_error(bare, disk / "run" / "x.pth").errno == errno.ENOSPC
    found = as_os_error(RuntimeError("PytorchStreamWriter failed writing file data/0"), tmp_path)
    assert found.errno == errno.EIO and found.filename == str(tmp_path)
    rust = ValueError("Error while serializing: I/O error: Permission denied (os error 13)")
    assert as_os_error(rust, tmp_path).errno == errno.EACCES
    assert as_os_error(RuntimeError("size mismatch"), tmp_path) is None
    with pytest.raises(Exception) as raised:
        torch.save({"f": lambda: 0}, io.BytesIO())
    if isinstance(raised.value, RuntimeError):
        assert as_os_error(raised.value, tmp_path) is None


def test_a_folder_that_takes_nothing(tmp_path):
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        check_writable(tmp_path / "gone")
    with small_disk(tmp_path / "disk", 128) as disk:
        check_writable(disk)
        fill(disk, leave=4096)
        with pytest.raises(OSError, match="No space left on device") as raised:
            check_writable(disk)
        assert raised.value.filename == str(disk)
