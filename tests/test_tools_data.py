"""tools.data: what explore finds, what split deals out, what pack writes and training reads."""

import collections
import errno
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import config
import datasets
import main as training
from tools.data.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("ant", "bee", "cat")


def save(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path, **options)


@pytest.fixture(scope="module")
def pets(tmp_path_factory) -> Path:
    """30 training and 6 validation pictures; 60 × 40 pixels, JPEG, brightness by class."""
    root = tmp_path_factory.mktemp("data") / "pets"
    rng = np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 2)):
        for label, name in enumerate(CLASSES):
            for i in range(count):
                pixels = rng.integers(80 * label, 80 * label + 40, (40, 60, 3))
                save(root / part / name / f"{i}.jpg", pixels, quality=95)
    return root


def open_part(data_set: str, path: Path, is_train: bool = True) -> datasets.ImageDataset:
    options = config.DataOptions(data_set=data_set, data_path=str(path))
    return datasets.build_dataset(is_train, options, None, seed=0)


def contents(dataset: datasets.ImageDataset) -> list[tuple[bytes, int]]:
    """Bytes and label of each picture."""
    found = []
    for index in range(len(dataset)):
        picture, label = dataset.source.read(index)
        found.append(
            (picture.read() if hasattr(picture, "read") else Path(picture).read_bytes(), label)
        )
    return found


# --- explore --------------------------------------------------------------------------------------


def test_explore_finds_what_is_wrong_with_a_set(pets, tmp_path, capsys):
    root = shutil.copytree(pets, tmp_path / "pets")
    (root / "train/bee/bad.jpg").write_bytes(b"\xff\xd8 not a picture")
    (root / "train/bee/copy.jpg").write_bytes((root / "train/ant/1.jpg").read_bytes())
    (root / "val/cat/leak.jpg").write_bytes((root / "train/cat/7.jpg").read_bytes())
    save(root / "train/cat/grey.png", np.full((20, 30), 51))
    assert (
        main(["explore", "--data-path", str(root), "--output-dir", str(tmp_path / "report")]) == 0
    )
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    train, val = report["parts"]["train"], report["parts"]["val"]
    assert train["pictures"] == train["read"] == 33 and val["pictures"] == 7
    assert train["classes"] == {"ant": 10, "bee": 12, "cat": 11}
    assert train["modes"] == {"RGB": 31, "L": 1}
    assert train["formats"] == {"JPEG": 31, "PNG": 1}
    assert (train["width"]["min"], train["width"]["max"]) == (30, 60)
    assert (train["height"]["min"], train["height"]["median"]) == (20, 40)
    [damaged] = train["damaged"]
    assert damaged["picture"].endswith("train/bee/bad.jpg") and "BytesIO" not in damaged["reason"]
    [group] = train["duplicates"]
    assert [Path(p).name for p in group["pictures"]] == ["1.jpg", "copy.jpg"]
    assert group["classes"] == ["ant", "bee"] and val["duplicates"] == []
    [leak] = report["leak"]
    assert leak["val"].endswith("leak.jpg") and leak["train"].endswith("7.jpg")
    assert leak["same_class"] is True
    said = "\n".join(report["warnings"])
    for words in ("1 picture can't be read", "under more than one class", "validation part in"):
        assert words in said
    assert said.splitlines() == [
        line.removeprefix("warning: ")
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("warning: ")
    ]
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<svg") == 0 and page.count("data:image/svg+xml") == 2
    assert page.count("data:image/png") == len(CLASSES)
    assert "bad.jpg" in page and "leak.jpg" in page and "http://" not in page


def test_explore_measures_as_numpy_does(pets, tmp_path):
    assert main(["explore", "--data-path", str(pets), "--output-dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["warnings"] == [] and report["leak"] == []
    pixels = np.stack([np.asarray(Image.open(p)) for p in sorted(pets.glob("train/*/*.jpg"))]) / 255
    assert np.allclose(report["parts"]["train"]["mean"], pixels.mean((0, 1, 2)), atol=1e-4)
    assert np.allclose(report["parts"]["train"]["std"], pixels.std((0, 1, 2)), atol=1e-4)
    brightness = pixels.mean((1, 2, 3))
    told = report["parts"]["train"]["brightness"]
    assert told["median"] == pytest.approx(np.median(brightness), abs=1e-5)
    assert told["max"] == pytest.approx(brightness.max(), abs=1e-5)


def test_explore_reads_sets_of_pixels_and_a_part_of_them(tmp_path):
    argv = ["explore", "--data-set", "DIGITS", "--output-dir", str(tmp_path), "--limit", "50"]
    assert main(argv) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    train = report["parts"]["train"]
    assert (train["pictures"], train["read"]) == (1438, 50) and train["modes"] == {"L": 50}
    assert train["width"]["max"] == 8 and sum(train["classes"].values()) == 50


# --- split ----------------------------------------------------------------------------------------


def rows(path: Path) -> dict[str, str]:
    dataset = datasets._csv_source(path)
    return {dataset.sample_id(i): dataset.classes[t] for i, t in enumerate(dataset.targets)}


def split(source: Path, folder: Path, *more: str) -> list[dict[str, str]]:
    assert main(["split", str(source), "--output-dir", str(folder), *more]) == 0
    return [
        rows(folder / f"{n}.csv")
        for n in ("train", "val", "test")
        if (folder / f"{n}.csv").exists()
    ]


def test_split_is_stratified_seeded_and_complete(pets, tmp_path):
    parts = split(pets / "train", tmp_path / "a", "--val", "0.2", "--test", "0.3")
    assert [len(part) for part in parts] == [15, 6, 9]
    for part, count in zip(parts, (5, 2, 3), strict=True):
        assert collections.Counter(part.values()) == dict.fromkeys(CLASSES, count)
    together = parts[0] | parts[1] | parts[2]
    assert together == {str(p): p.parent.name for p in pets.glob("train/*/*.jpg")}
    assert split(pets / "train", tmp_path / "b", "--val", "0.2", "--test", "0.3") == parts
    other = split(pets / "train", tmp_path / "c", "--val", "0.2", "--test", "0.3", "--seed", "1")
    assert other != parts
    # From a list the same comes out as from the folder.
    lines = [f"{path},{name}" for path, name in together.items()]
    (tmp_path / "all.csv").write_text("\n".join(["path,label", *lines]))
    again = split(tmp_path / "all.csv", tmp_path / "d", "--val", "0.2", "--test", "0.3")
    assert again == parts


def test_split_is_read_by_training(pets, tmp_path):
    train, val = split(pets / "train", tmp_path)
    for is_train, part in ((True, train), (False, val)):
        dataset = open_part("CSV", tmp_path, is_train)
        assert dataset.classes == list(CLASSES) and len(dataset) == len(part)
        assert not dataset.source.sample_id(0).startswith(str(tmp_path))


def test_split_writes_relative_paths_where_it_lies_above_the_pictures(pets, tmp_path):
    root = shutil.copytree(pets / "train", tmp_path / "pictures")
    split(root, tmp_path)
    tmp_path = tmp_path.rename(tmp_path.with_name("moved"))
    assert len(open_part("CSV", tmp_path)) == 27
    assert (tmp_path / "train.csv").read_text().splitlines()[1].startswith("pictures/ant/")
    assert Path(open_part("CSV", tmp_path).sample_id(0)).exists()


def test_split_refuses(pets, tmp_path, capsys):
    def fails(*argv: str) -> str:
        assert main(["split", *argv]) == 2
        return capsys.readouterr().err

    assert "validation part already" in fails(str(pets), "--output-dir", str(tmp_path))
    assert "does not exist" in fails(str(tmp_path / "no"), "--output-dir", str(tmp_path))
    source = str(pets / "train")
    assert "--val above 0" in fails(source, "--output-dir", str(tmp_path), "--val", "0")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "val.csv").write_text("mine")
    assert "there already" in fails(source, "--output-dir", str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["val.csv"]


def test_split_says_which_part_lacks_a_class(tmp_path, capsys):
    for name, count in (("many", 9), ("one", 1)):
        for i in range(count):
            save(tmp_path / "p" / name / f"{i}.png", np.full((4, 4), i))
    train, val = split(tmp_path / "p", tmp_path / "s")
    assert list(val.values()) == ["many"] and "one" in train.values()
    assert "warning: val has no picture of 1 classes" in capsys.readouterr().out


# --- pack -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(pets, tmp_path_factory) -> Path:
    """``pets`` in shards of about 20 KiB, bytes as they are."""
    folder = tmp_path_factory.mktemp("packed") / "shards"
    argv = ["pack", "--data-path", str(pets), "--output-dir", str(folder), "--shard-size", "0.02"]
    assert main(argv) == 0
    return folder


def test_packed_pictures_are_those_of_the_folder(pets, shards):
    for is_train in (True, False):
        packed, loose = open_part("wds/pets", shards, is_train), open_part("IMNET", pets, is_train)
        assert packed.classes == loose.classes and contents(packed) == contents(loose)


def test_the_index_says_what_the_tar_headers_say(shards):
    tars = sorted(shards.glob("*.tar"))
    assert len(tars) > 4
    for shard in tars:
        read, scanned = datasets.ShardIndex.read(shard), datasets.ShardIndex.scan(shard)
        for name in datasets.ShardIndex._fields:
            assert np.array_equal(getattr(read, name), getattr(scanned, name))


def test_training_reads_no_header_where_there_is_an_index(pets, shards, monkeypatch):
    monkeypatch.setattr(datasets, "_shard_samples", lambda shard: pytest.fail("scanned"))
    assert len(open_part("wds/pets", shards)) == 30


def test_an_index_of_another_shard_is_not_believed(shards, tmp_path, caplog):
    """Nor one that is damaged: the shard is scanned."""
    folder = shutil.copytree(shards, tmp_path / "shards")
    want = contents(open_part("wds/pets", folder))
    first, second, third = sorted(folder.glob("train-*.tar"))[:3]
    index = datasets.ShardIndex.path
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
    """Larger pictures get that short side and keep their shape; others keep their bytes."""
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
        pixels = np.asarray(datasets.decode(packed.source.open(index)))
        assert np.array_equal(pixels[..., 0], own.source.open(index))


def test_pack_stops_at_a_damaged_picture_or_leaves_it_out(pets, tmp_path, capsys):
    root = shutil.copytree(pets, tmp_path / "pets")
    (root / "train/bee/3.jpg").write_bytes(b"nothing")
    argv = ["pack", "--data-path", str(root), "--output-dir", str(tmp_path / "s")]
    assert main(argv) == 2
    assert "bee/3.jpg: not a picture" in capsys.readouterr().err
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
    def full(self, shard):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.ShardIndex, "write", full)
    argv = ["pack", "--data-path", str(pets), "--output-dir", str(tmp_path / "s")]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "no space left" in said and "--short-side" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- the page that tells of it --------------------------------------------------------------------


def test_commands_of_the_page(pets, tmp_path, monkeypatch):
    """Every command of docs/data.md does what it should, on small pictures."""
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
        else:
            continue
        assert code == 0, words
        ran += 1
    assert ran >= 8
