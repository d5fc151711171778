"""training/bad_images.py: each unreadable image is said once and listed once, for all sessions."""

from types import SimpleNamespace

from outputs.files import Outputs
from training.bad_images import BAD_IMAGES_FILE, BadImages


def test_an_image_that_comes_again_is_said_and_listed_once(tmp_path, caplog):
    found = BadImages(tmp_path, Outputs())
    batches = [SimpleNamespace(bad=bad) for bad in (["a: cut"], [], ["b: empty", "a: cut"])]
    assert list(found.watch(batches)) == batches
    assert [r.getMessage().rpartition("skipped: ")[2] for r in caplog.records] == [
        *("a: cut", "b: empty")
    ]
    found.gather(is_main=True)
    assert (tmp_path / BAD_IMAGES_FILE).read_text() == "a: cut\nb: empty\n"


def test_the_list_of_earlier_sessions_goes_on(tmp_path):
    found = BadImages(tmp_path, Outputs(), ["a: cut", "old: gone"])
    found.note(["new: cut", "a: cut"])
    found.gather(is_main=True)
    assert found.listed == ["a: cut", "old: gone", "new: cut"]
    assert (tmp_path / BAD_IMAGES_FILE).read_text().splitlines() == found.listed


def test_only_the_main_process_writes_and_only_what_is_new(tmp_path):
    other = BadImages(tmp_path, Outputs())
    other.note(["a: cut"])
    other.gather(is_main=False)
    BadImages(tmp_path, Outputs(), ["a: cut"]).gather(is_main=True)
    assert other.listed == ["a: cut"] and not (tmp_path / BAD_IMAGES_FILE).exists()
