"""tools.data pack: what it writes and training reads.

Also of tools/common/reading.py and tools/data/raw.py.
"""

import errno
import io
import json
import re
import shlex
import shutil
import signal
from pathlib import Path

import disks
import numpy as np
import pytest
import torch
from data_parts import contents, open_part, save
from PIL import Image

import main as training
from augmentation.preprocessing import Preprocessing
from augmentation.transforms import CentreCrop
from pipeline.decoding import decode
from pipeline.image_file import ImageFile
from pipeline.kept_pixels import small_pixels
from pipeline.sources.shard_index import ShardIndex
from tools import summary
from tools.data.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shards(pets, tmp_path_factory) -> Path:
    """``pets`` in shards of about 20 KiB, bytes as they are."""
    folder = tmp_path_factory.mktemp("packed") / "shards"
    argv = ["pack", "--data-path", str(pets), "--output-dir", str(folder), "--shard-size", "0.02"]
    assert main(argv) == 0
    return folder


def test_packed_images_are_those_of_the_folder(pets, shards):
    for is_train in (True, False):
        packed, loose = open_part("wds/pets", shards, is_train), open_part("IMNET", pets, is_train)
        assert packed.classes == loose.classes and contents(packed) == contents(loose)


def test_the_index_says_what_the_tar_headers_say(shards):
    tars = sorted(shards.glob("*.tar"))
    assert len(tars) > 4
    for shard in tars:
        read, scanned = ShardIndex.read(shard), ShardIndex.scan(shard)
        for name in ShardIndex._fields:
            assert np.array_equal(getattr(read, name), getattr(scanned, name))


def test_training_reads_no_header_where_there_is_an_index(pets, shards, monkeypatch):
    monkeypatch.setattr(
        "pipeline.sources.shard_index.shard_samples", lambda shard: pytest.fail("scanned")
    )
    assert len(open_part("wds/pets", shards)) == 30


def test_an_index_of_another_shard_is_not_believed(shards, tmp_path, caplog):
    """Nor one that is damaged: the shard is scanned."""
    folder = shutil.copytree(shards, tmp_path / "shards")
    want = contents(open_part("wds/pets", folder))
    first, second, third = sorted(folder.glob("train-*.tar"))[:3]
    index = ShardIndex.path
    shutil.copy(index(second), index(first))
    index(second).write_bytes(index(second).read_bytes()[:200])
    third.write_bytes(third.read_bytes() + bytes(10240))  # as tar files may be longer
    assert contents(open_part("wds/pets", folder)) == want
    said = [r.getMessage() for r in caplog.records]
    assert sum("is of another shard" in line for line in said) == 2
    assert sum("can't be read" in line for line in said) == 1


def test_info_is_what_timm_and_webdataset_read(pets, shards):
    info = json.loads((shards / "_info.json").read_text())
    assert list(info["splits"]) == ["train", "validation"]
    train = info["splits"]["train"]
    assert train["num_samples"] == sum(train["shard_lengths"]) == 30
    wds = pytest.importorskip("webdataset")
    files = [str(shards / name) for name in train["filenames"]]
    samples = list(wds.WebDataset(files, shardshuffle=False))
    loose = contents(open_part("IMNET", pets))
    assert [(s["jpg"], int(s["cls"])) for s in samples] == loose
    from timm.data.readers.reader_wds import _parse_split_info

    assert _parse_split_info("train", info).shard_lengths == tuple(train["shard_lengths"])


def test_short_side(pets, tmp_path):
    """Larger images get that short side and keep their shape; others keep their bytes."""
    root = shutil.copytree(pets, tmp_path / "pets")
    save(root / "train/ant/small.png", np.full((20, 30), 9))
    tall = np.random.default_rng(1).integers(0, 255, (100, 50, 3))
    save(root / "train/ant/tall.png", tall)
    argv = ["pack", "--data-path", str(root), "--output-dir", str(tmp_path / "s")]
    assert main([*argv, "--short-side", "25", "--quality", "90"]) == 0
    packed, loose = open_part("wds/x", tmp_path / "s"), open_part("IMNET", root)
    names = [Path(loose.sample_id(i)).name for i in range(len(loose))]
    for name, (new, _), (old, _) in zip(names, contents(packed), contents(loose), strict=True):
        image = Image.open(io.BytesIO(new))
        if name == "small.png":
            assert new == old
        else:
            assert image.format == "JPEG"
            assert image.size == ((25, 50) if name == "tall.png" else (38, 25))


def test_pixels_are_packed_without_loss(tmp_path):
    argv = ["pack", "--data-set", "DIGITS", "--output-dir", str(tmp_path / "digits")]
    assert main(argv) == 0
    packed, own = open_part("wds/digits", tmp_path / "digits"), open_part("DIGITS", tmp_path)
    assert packed.classes == own.classes and packed.targets.tolist() == own.targets.tolist()
    for index in (0, 700, 1437):
        pixels = np.asarray(decode(packed.source.open(index)))
        assert np.array_equal(pixels[..., 0], own.source.open(index))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_pack_that_is_stopped_leaves_nothing(pets, tmp_path, monkeypatch, number):
    monkeypatch.setattr("tools.data.pack.write_part", lambda *_: signal.raise_signal(number))
    before = signal.getsignal(number)
    arguments = ["pack", "--data-path", str(pets), "--output-dir", str(tmp_path / "packed")]
    assert main(arguments) == 128 + number
    assert not list(tmp_path.glob("*packed*")) and not list(tmp_path.glob(".*packed*"))
    assert signal.getsignal(number) == before


def test_pack_stops_at_a_damaged_image_or_leaves_it_out(pets, tmp_path, capsys):
    root = shutil.copytree(pets, tmp_path / "pets")
    (root / "train/bee/3.jpg").write_bytes(b"nothing")
    argv = ["pack", "--data-path", str(root), "--output-dir", str(tmp_path / "s")]
    assert main(argv) == 2
    assert "bee/3.jpg: not an image" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["pets"]
    assert main([*argv, "--on-bad-image", "skip"]) == 0
    assert "left out: " in capsys.readouterr().out
    assert len(open_part("wds/x", tmp_path / "s")) == 29


def test_pack_overwrites_nothing(pets, tmp_path, capsys):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine").touch()
    argv = ["pack", "--data-path", str(pets), "--output-dir", str(tmp_path / "s")]
    assert main(argv) == 2 and "there already" in capsys.readouterr().err
    (tmp_path / ".t.partial").mkdir()
    assert main([*argv[:-1], str(tmp_path / "t")]) == 2
    assert "another pack is at work" in capsys.readouterr().err
    assert (tmp_path / ".t.partial").exists() and (tmp_path / "s" / "mine").exists()


def test_a_full_disk_leaves_nothing_and_says_what_helps(pets, tmp_path, capsys, monkeypatch):
    def full(self, shard, labels):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardIndex, "write", full)
    argv = ["pack", "--data-path", str(pets), "--output-dir", str(tmp_path / "s")]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "no space left" in said and "--short-side" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def pack_raw(root, folder, *options) -> int:
    argv = ["pack", "--format", "raw", "--data-path", str(root), "--output-dir", str(folder)]
    return main([*argv, *options])


@pytest.mark.parametrize("option", ["--shard-size", "--quality"])
def test_raw_images_have_no_shards_and_no_jpeg_files(option, pets, tmp_path, capsys):
    assert pack_raw(pets, tmp_path / "raw", option, "90") == 2
    assert f"{option}: leave it out" in capsys.readouterr().err
    assert not (tmp_path / "raw").exists()


def test_raw_training_images_are_those_of_the_disk_cache(pets, tmp_path):
    assert pack_raw(pets, tmp_path / "raw", "--short-side", "30") == 0
    packed, loose = open_part("raw/pets", tmp_path / "raw"), open_part("IMNET", pets)
    assert packed.classes == loose.classes
    assert np.array_equal(packed.targets, loose.targets)
    for number in range(len(loose)):
        want = small_pixels(loose.source.open(number), 30, "white", scaled=True)
        assert np.array_equal(packed.source.open(number), want)
    mode = (tmp_path / "raw" / "train.images").stat().st_mode
    assert mode == (tmp_path / "raw" / "_raw.json").stat().st_mode


def test_evaluation_of_raw_images_of_its_size_is_exact(pets, tmp_path):
    assert pack_raw(pets, tmp_path / "raw", "--short-side", "32") == 0
    crop = CentreCrop(Preprocessing(28, 0.875, "bicubic", (0.5,) * 3, (0.5,) * 3))
    packed, loose = (
        open_part(*place, is_train=False)
        for place in (("raw/x", tmp_path / "raw"), ("IMNET", pets))
    )
    for number in range(len(loose)):
        seen = [crop.keep(decode(part.source.open(number))) for part in (packed, loose)]
        assert torch.equal(*seen)


def test_raw_images_as_they_are_and_left_out(pets, tmp_path, capsys):
    root = shutil.copytree(pets, tmp_path / "pets")
    (root / "train/bee/3.jpg").write_bytes(b"nothing")
    assert pack_raw(root, tmp_path / "raw") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["pets"]
    options = ("--short-side", "0", "--on-bad-image", "skip")
    assert pack_raw(root, tmp_path / "raw", *options) == 0
    assert "left out: " in capsys.readouterr().out
    packed = open_part("raw/x", tmp_path / "raw")
    assert len(packed) == 29 and packed.source.open(0).shape == (40, 60, 3)
    assert pack_raw(root, tmp_path / "other", "--short-side", "-1") == 2


def test_a_full_disk_ends_raw_packing_before_and_while_it_writes(
    pets, tmp_path, capsys, monkeypatch
):
    with disks.small_disk(tmp_path / "disk", 100) as disk:
        assert pack_raw(pets, disk / "raw") == 2
        assert "images need about" in capsys.readouterr().err
        monkeypatch.setattr("tools.data.raw.estimated_bytes", lambda *_: 0)
        assert pack_raw(pets, disk / "raw") == 2
        assert "no space left for the images" in capsys.readouterr().err
        assert list(disk.iterdir()) == []


def test_a_disk_that_loses_what_was_written_is_noticed(pets, tmp_path, capsys, monkeypatch):
    def lose(self):
        with open(self.path, "r+b") as file:
            file.seek(-1000, 2)
            file.write(bytes(1000))

    monkeypatch.setattr(ImageFile, "sync", lose)
    assert pack_raw(pets, tmp_path / "raw") == 2
    assert "doesn't hold what was written to it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_commands_of_the_page(pets, tmp_path, monkeypatch):
    """Every command of docs/data.md does what it should, on small images."""
    shutil.copytree(pets, tmp_path / "pets")
    shutil.copytree(pets / "train", tmp_path / "flat")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [x for block in re.findall(r"```sh\n(.*?)```", text, re.S) for x in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines]
    small = ["--model", "modern_lenet", "--input-size", "28", "--epochs", "1", "--batch-size", "2"]
    small += ["--warmup-epochs", "0", "--device", "cpu", "--num-workers", "0", "--no-tensorboard"]
    ran = 0
    for words in filter(None, commands):
        if words[:3] == ["python", "-m", "tools.data"]:
            code = main(words[3:])
        elif words[:2] == ["python", "main.py"]:
            code = training.main([*words[2:], *([] if "--eval" in words else small)])
        elif words[:3] == ["python", "-m", "tools.summary"]:
            code = summary.main(words[3:])
        else:
            continue
        assert code == 0, words
        ran += 1
    assert ran >= 8
