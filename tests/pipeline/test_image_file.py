"""pipeline/image_file.py: decoded images that processes read and fill together; failing disks."""

import errno
import os
import random
import signal
import time
import zlib

import disks
import numpy as np
import pytest

from augmentation.protocol import RGB, Form
from pipeline import image_file
from pipeline.image_file import KEY_BYTES, DamagedError, ImageFile, digest, in_use

KEY = bytes(range(KEY_BYTES))
COUNT = 12
SEEN = bytes(image_file.ROW_BYTES)  # of an image that isn't there


def pixels_of(number: int, form: Form = RGB) -> np.ndarray:
    """Another shape and content for each image."""
    shape = (40 + number, 60 - number, form.channels)
    kind = np.uint8 if form.bit_depth == 8 else np.uint16
    return np.random.default_rng(number).integers(0, form.levels + 1, shape, dtype=kind)


def fill(file: ImageFile, numbers) -> None:
    for number in numbers:
        row, seen = file.row(number)
        if not row.offset:
            file.write(number, pixels_of(number, file.form), number, 7 * number, seen)


def right(file: ImageFile, number: int) -> bool:
    """Whether an image is there; it must be the one that was written."""
    row, _ = file.row(number)
    if not row.offset:
        return False
    assert np.array_equal(file.pixels(row), pixels_of(number, file.form))
    assert (row.label, row.stamp) == (number, 7 * number)
    return True


FORMS = pytest.mark.parametrize("form", [RGB, Form(5, 16), Form(1, 8)], ids=str)


@FORMS
def test_images_are_read_as_they_were_written(tmp_path, form):
    path = tmp_path / "a.images"
    file = ImageFile(path, KEY, COUNT, form)
    fill(file, (3, 0, 11))
    other = ImageFile(path, KEY, COUNT, form)  # as another process would
    assert [right(other, n) for n in range(COUNT)] == [n in (0, 3, 11) for n in range(COUNT)]
    fill(other, range(COUNT))
    assert file.there().all() and all(right(file, n) for n in range(COUNT))
    read = ImageFile(path)
    assert (read.key, read.count, read.form, read.writable) == (KEY, COUNT, form, False)
    assert path.read_bytes()[:8] == (b"images1\n" if form == RGB else b"images2\n")
    del file, other, read
    other = ImageFile(path, KEY, COUNT, Form(2, 16))  # nobody has it open: it is made anew
    assert not other.there().any()


def test_an_image_is_written_once(tmp_path):
    first, second = (ImageFile(tmp_path / "a.images", KEY, COUNT) for _ in range(2))
    assert first.write(4, pixels_of(4), 4, 28, SEEN)
    size = first.size()
    assert not second.write(4, pixels_of(4), 4, 28, SEEN)  # it was seen as missing
    assert second.size() == size and right(second, 4)


def test_the_digest_is_the_crc_of_the_sums_of_columns_and_rows():
    pixels = np.random.default_rng(0).integers(0, 256, (53, 61, 3), dtype=np.uint8)
    content = pixels.tobytes()
    whole = len(content) // 4096 * 4096
    words = [int.from_bytes(content[i : i + 8], "little") for i in range(0, whole, 8)]
    rows = [sum(words[i : i + 512]) % 2**64 for i in range(0, len(words), 512)]
    columns = [sum(words[i::512]) % 2**64 for i in range(512)]
    want = zlib.crc32(content[whole:])
    for sums in (columns, rows):
        want = zlib.crc32(b"".join(n.to_bytes(8, "little") for n in sums), want)
    assert digest(pixels) == want


@FORMS
def test_flipped_bits_never_give_other_pixels(tmp_path, form):
    path = tmp_path / "a.images"
    file = ImageFile(path, KEY, COUNT, form)
    fill(file, range(COUNT))
    rng = random.Random(1)
    damaged = 0
    with open(path, "r+b", buffering=0) as disk:
        for flips in [1] * 200 + [2, 3] * 50:
            places = [rng.randrange(image_file.HEADER_BYTES, file.size()) for _ in range(flips)]
            if rng.random() < 0.5:  # in the index, or near each other
                start = rng.choice((image_file.HEADER_BYTES, file.size() - 4000))
                places = [start + rng.randrange(400) for _ in range(flips)]
            before = [os.pread(disk.fileno(), 1, place) for place in places]
            for place, byte in zip(places, before, strict=True):
                os.pwrite(disk.fileno(), bytes([byte[0] ^ 1 << rng.randrange(8)]), place)
            for number in range(COUNT):
                try:
                    damaged += not right(file, number)
                except DamagedError:
                    damaged += 1
            for place, byte in zip(places, before, strict=True):
                os.pwrite(disk.fileno(), byte, place)
    assert damaged >= 250
    assert all(right(file, n) for n in range(COUNT))


def test_a_file_that_is_cut_short_lacks_what_is_gone(tmp_path):
    path = tmp_path / "a.images"
    file = ImageFile(path, KEY, COUNT)
    fill(file, range(COUNT))
    os.truncate(path, file.size() - 100)
    with pytest.raises(DamagedError):
        file.pixels(file.row(COUNT - 1)[0])
    assert all(right(file, n) for n in range(COUNT - 1))


def test_a_process_that_is_killed_leaves_whole_images_only(tmp_path):
    count, path = 3000, tmp_path / "a.images"
    for seed in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                fill(ImageFile(path, KEY, count), range(count))
            finally:
                os._exit(0)
        time.sleep(0.02 + 0.02 * seed)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    file = ImageFile(path, KEY, count)
    there = file.there()
    assert 0 < there.sum() < count
    assert [right(file, n) for n in range(count)] == there.tolist()


def test_processes_that_fill_one_file_share_the_work(tmp_path):
    count, path = 60, tmp_path / "a.images"
    pids = []
    for seed in range(3):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                numbers = list(range(count))
                random.Random(seed).shuffle(numbers)
                file = ImageFile(path, KEY, count)  # all three may make it
                while not file.there().all():  # one that another is at is left out at first
                    fill(file, numbers)
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 3
    file = ImageFile(path, KEY, count)
    assert all(right(file, n) for n in range(count))
    data = sum(pixels_of(n).nbytes for n in range(count))
    assert file.size() == image_file.HEADER_BYTES + count * image_file.ROW_BYTES + data


def test_a_full_disk_is_an_error_and_costs_nothing_that_was_there(tmp_path):
    with disks.small_disk(tmp_path / "disk", 64) as disk:
        file = ImageFile(disk / "a.images", KEY, COUNT)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            fill(file, range(COUNT))
        there = file.there().tolist()
        assert 3 < sum(there) < COUNT
        assert [right(file, n) for n in range(COUNT)] == there
        disks.resize(disk, 256)
        fill(file, range(COUNT))
        assert all(right(file, n) for n in range(COUNT))


def test_a_read_only_disk_is_read(tmp_path):
    with disks.small_disk(tmp_path / "disk", 256) as disk:
        fill(ImageFile(disk / "a.images", KEY, COUNT), range(5))
        disks.read_only(disk)
        file = ImageFile(disk / "a.images", KEY, COUNT)
        assert not file.writable and [right(file, n) for n in range(6)] == [True] * 5 + [False]
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            ImageFile(disk / "new.images", KEY, COUNT)


def test_a_damaged_header_is_written_anew_unless_the_file_is_in_use(tmp_path, monkeypatch):
    path = tmp_path / "a.images"
    file = ImageFile(path, KEY, COUNT)
    fill(file, range(COUNT))
    with open(path, "r+b") as disk:
        disk.write(b"nothing")
    monkeypatch.setattr(image_file, "START_SECONDS", 0.1)
    with pytest.raises(DamagedError, match="another process holds it"):
        ImageFile(path, KEY, COUNT)
    assert all(right(file, n) for n in range(COUNT))  # it goes on
    with pytest.raises(DamagedError, match="no file of these images"):
        ImageFile(path)
    del file
    file = ImageFile(path, KEY, COUNT)
    assert not file.there().any()
    fill(file, range(COUNT))
    assert all(right(file, n) for n in range(COUNT))


def test_a_file_is_in_use_while_it_is_open(tmp_path):
    path = tmp_path / "a.images"
    first, second = (ImageFile(path, KEY, COUNT) for _ in range(2))
    del first
    assert in_use(path)
    pid = os.fork()
    if pid == 0:
        second.row(0)
        os._exit(0 if in_use(path) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert in_use(path)  # a worker's end changes nothing
    del second
    assert not in_use(path)


def test_another_file_in_its_place_is_not_taken_for_it(tmp_path):
    path = tmp_path / "a.images"
    file = ImageFile(path, KEY, COUNT)
    fill(file, (1,))
    path.unlink()
    other = ImageFile(path, KEY, COUNT)
    assert right(file, 1) and not right(other, 1)
    pid = os.fork()  # opens by name
    if pid == 0:
        code = 1
        try:
            file.row(1)
        except OSError:
            code = 0
        os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def test_links_and_pipes_are_not_followed(tmp_path):
    (tmp_path / "real").write_bytes(b"mine")
    (tmp_path / "a.images").symlink_to(tmp_path / "real")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        ImageFile(tmp_path / "a.images", KEY, COUNT)
    assert (tmp_path / "real").read_bytes() == b"mine"
    os.mkfifo(tmp_path / "pipe.images")
    with pytest.raises((OSError, DamagedError)):
        ImageFile(tmp_path / "pipe.images")
