"""pipeline/sources/scan.py: image files below folders, and what is odd there."""

import errno
import os
from pathlib import Path

import pytest
from PIL import Image
from tiny_sets import open_set, save

from errors import DataError
from pipeline.dataset import findings
from pipeline.sources.scan import ClassScan, image_files, listing


@pytest.fixture
def pets(tmp_path):
    for name in ("cat", "dog"):
        for i in range(3):
            save(tmp_path / name / f"{i}.png", seed=i)
    return tmp_path


def scan(root, *more, on_bad_image="error"):
    return ClassScan(root, ["cat", "dog", *more], on_bad_image)


def paths(found: ClassScan) -> list[str]:
    return [os.fsdecode(name) for name in found.names]


def test_files_come_in_the_order_of_a_sorted_walk(pets):
    """That of torchvision's ImageFolder within a folder: files first, then folders."""
    for name in ("b/9.JPG", "b/1.png", "a/0.png", "a/z/0.png", ".git/0.png", "__MACOSX/0.png"):
        save(pets / "cat" / name)
    (pets / "cat" / "._0.png").touch()
    expected = []
    for folder, folders, files in os.walk(pets / "cat"):
        folders[:] = sorted(f for f in folders if f not in (".git", "__MACOSX"))
        names = sorted(f for f in files if not f.startswith("."))
        expected += [os.path.relpath(os.path.join(folder, name), pets) for name in names]
    found = scan(pets)
    assert [p for p in paths(found) if p.startswith("cat")] == expected and len(expected) == 7
    assert found.targets.tolist() == [0] * 7 + [1] * 3 and found.findings == []
    assert [os.path.relpath(p, pets) for p in image_files(pets / "cat")] == expected


def test_a_folder_counts_once_however_many_links_lead_to_it(pets):
    clean = paths(scan(pets))
    (pets / "cat" / "self").symlink_to(".")
    (pets / "cat" / "up").symlink_to("..")
    (pets / "cat" / "more").mkdir()
    (pets / "cat" / "more" / "back").symlink_to("../../cat")
    save(pets / "dog" / "inner" / "7.png")
    (pets / "dog" / "zlink").symlink_to("inner")
    found = scan(pets)
    assert paths(found) == [*clean, "dog/inner/7.png"]
    [finding] = found.findings
    assert finding.startswith(f"{pets}: 4 links lead to a folder above, or to one that is counted")
    for name in ("cat/self", "cat/up", "cat/more/back"):
        assert name in finding


def test_links_are_followed_where_they_lead_elsewhere(pets, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    save(other / "5.png")
    (pets / "cat" / "more").symlink_to(other)
    assert "cat/more/5.png" in paths(scan(pets))
    (pets / "dog" / "more").symlink_to(other)
    (pets / "dog" / "gone").symlink_to(pets / "nowhere")
    nowhere, twice = scan(pets).findings
    assert "1 link leads nowhere" in nowhere and "dog/gone" in nowhere
    assert "cat/more and dog/more" in twice


@pytest.mark.parametrize(
    ("code", "fix"),
    [
        (errno.EACCES, "Permission denied .*chmod"),
        (errno.EIO, "Input/output error .*storage"),
        (errno.EMFILE, "Too many open files .*ulimit -n"),
        (errno.ENOENT, "No such file or directory .*no longer"),
    ],
)
def test_a_folder_that_cannot_be_read_is_named(pets, monkeypatch, code, fix):
    """Never fewer images without a word."""
    save(pets / "cat" / "more" / "5.png")
    real, bad = os.scandir, str(pets / "cat" / "more")

    def scandir(path):
        if str(path) == bad:
            raise OSError(code, os.strerror(code), path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for read in (scan, lambda root: list(image_files(root))):
        with pytest.raises(DataError, match=rf"cat/more: {fix}"):
            read(pets)


def test_images_that_need_a_package_stop_it_or_are_named(pets, monkeypatch):
    Image.init()
    monkeypatch.setattr(Image, "OPEN", {k: v for k, v in Image.OPEN.items() if k != "HEIF"})
    for i in range(2):
        (pets / "dog" / f"IMG_{i}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(DataError, match=r"2 HEIC images \(dog/IMG_0.HEIC, dog/IMG_1.HEIC\).*"):
        scan(pets)
    found = scan(pets, on_bad_image="skip")
    assert len(found.names) == 6
    assert "2 HEIC images" in found.findings[0] and "pip install pillow-heif" in found.findings[0]


def test_images_that_are_not_read_are_named(pets):
    for name in ("a.NEF", "b.nef", "c.svg"):
        (pets / "cat" / name).write_bytes(b"x")
    (pets / "cat" / "notes.txt").write_text("x")
    for i in range(2):
        (pets / "dog" / f"n0208_{i}").write_bytes((pets / "dog" / "0.png").read_bytes())
    found = scan(pets)
    raw, drawing, nameless = found.findings
    assert "2 NEF images (cat/a.NEF, cat/b.nef) are left out" in raw and "1 SVG images" in drawing
    assert "2 files without extension are left out though they are images" in nameless
    assert found.not_images == {".nef": 2, "without extension": 2, ".svg": 1, ".txt": 1}
    assert found.why_empty("cat").startswith(
        "holds no images, only files .nef, .svg, .txt: convert"
    )


def test_findings_can_be_shown_whatever_the_names(pets):
    (pets / "cat" / os.fsdecode(b"caf\xe9.nef")).write_bytes(b"x")
    dataset = open_set("IMNET", pets, val_fraction=0.5)
    [text] = findings(dataset)
    assert "caf\\xe9.nef" in text and text.isprintable()


def test_classes_one_level_deeper_are_pointed_out(tmp_path):
    for name in ("cat/tom", "cat/tim", "dog/rex", "dog/max"):
        save(tmp_path / name / "0.png")
    [finding] = scan(tmp_path).findings
    assert "the classes are cat, dog, whose folders hold no images" in finding
    assert f"--data-path {tmp_path}/cat" in finding
    (tmp_path / "dog" / "max" / "0.png").unlink()
    assert scan(tmp_path).findings == [finding]
    save(tmp_path / "dog" / "0.png")
    assert scan(tmp_path).findings == []


def test_one_folder_with_the_images_in_each_class_is_nothing_special(tmp_path):
    """As in Tiny ImageNet: CLASS/images/IMAGE."""
    for name in ("cat/images", "dog/images"):
        save(tmp_path / name / "0.png")
    assert scan(tmp_path).findings == []


def test_masks_beside_images_are_pointed_out(pets):
    """As in sets of ultrasound and X-ray images, where every second image would be a mask."""
    save(pets / "cat" / "mask.png")
    save(pets / "cat" / "party_mask.png")
    assert scan(pets).findings == []
    save(pets / "cat" / "0_mask.png")
    save(pets / "dog" / "1 (4).png")
    save(pets / "dog" / "1 (4)_Mask_1.png")
    save(pets / "dog" / "masks" / "1.png")
    assert len(scan(pets).targets) == 12
    [finding] = scan(pets).findings
    assert finding == (
        f"{pets}: 3 files are named as masks of other images (cat/0_mask.png, dog/1 "
        "(4)_Mask_1.png, …) and count as images of their class: if they are masks, move them "
        "elsewhere"
    )


def test_listing(tmp_path):
    for name in ("b", "a", ".x", "@eaDir"):
        (tmp_path / name).mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "1.TIF").touch()
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    found = listing(tmp_path)
    assert found.folders == ["a", "b"] and found.broken == ["loop"]
    # An image that is missing is named when it is read.
    assert found.images == ["1.TIF", "gone.jpg"]
    with pytest.raises(DataError, match="No such file"):
        listing(Path(tmp_path / "c"))
