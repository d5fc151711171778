"""pipeline/sources/shards.py: tar shards in WebDataset's form.

Also of pipeline/sources/shard_index.py.
"""

import gzip
import io
import json
import os
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from tiny_sets import assert_same, expected, load, open_set, png

from errors import DataError, OptionError
from pipeline.sources import shard_index
from pipeline.sources.shard_index import ShardIndex
from samplers import RASampler


def write_shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_webdataset_shards(tmp_path):
    wds = pytest.importorskip("webdataset")
    number = 0
    for shard, count in (("set-train-0000", 3), ("set-train-0001", 2), ("set-val-0000", 2)):
        with wds.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for _ in range(count):
                sample = {"__key__": f"s{number:03d}", "png": png(number), "cls": number % 4}
                writer.write(sample)
                number += 1
    train, val = (open_set("wds/set", tmp_path, t) for t in (True, False))
    assert train.classes == val.classes == ["0", "1", "2", "3"]
    assert train.targets.tolist() == [0, 1, 2, 3, 0] and val.targets.tolist() == [1, 2]
    assert train.sample_id(3).endswith("set-train-0001.tar:s003")
    for i in range(5):
        assert torch.equal(train[i].image, expected(i))
    batches = [load(train, RASampler(5, seed=2), workers) for workers in (0, 2)]
    assert_same(*batches)


def test_webdataset_info_and_json_labels(tmp_path):
    samples = [
        (f"d/{i}.{end}", body)
        for i in range(3)
        for end, body in (("seg.txt", b"x"), ("JPG", png(i)), ("json", b'{"label": %d}' % i))
    ]
    write_shard(tmp_path / "one.tar", samples)
    write_shard(tmp_path / "two.tar", samples[:3])
    splits = {"train": {"filenames": ["one.tar"]}, "validation": {"filenames": ["two.tar"]}}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    assert open_set("wds/x", tmp_path).targets.tolist() == [0, 1, 2]
    assert len(open_set("wds/x", tmp_path, False)) == 1


def test_webdataset_mistakes(tmp_path):
    with pytest.raises(OptionError, match=r"no shards \*train\*\.tar"):
        open_set("wds/x", tmp_path)
    shard = tmp_path / "train.tar"
    write_shard(shard, [("a.png", png(0)), ("a.cls", b"zero")])
    with pytest.raises(DataError, match="sample a needs its label"):
        open_set("wds/x", tmp_path)
    write_shard(shard, [("a.cls", b"0")])
    with pytest.raises(DataError, match="sample a has no image"):
        open_set("wds/x", tmp_path)
    shard.write_bytes(gzip.compress(b"x" * 100))
    with pytest.raises(DataError, match="not a plain tar file"):
        open_set("wds/x", tmp_path)
    write_shard(shard, [("a.png", png(0)), ("a.cls", b"0")])
    with pytest.raises(OptionError, match=r"no shards \*val\*\.tar"):
        open_set("wds/x", tmp_path, False)
    write_shard(tmp_path / "val.tar", [("a.png", png(0)), ("a.cls", b"1")])
    with pytest.raises(DataError, match=r"val\.tar:a: label 1 is none of the 1 classes"):
        open_set("wds/x", tmp_path, False)


SAMPLE = [("a.png", png(0)), ("a.cls", b"0")]
LABELS = {
    b"1000000000000": "label 1000000000000: from 0 to 999999 at most",
    b"-1": "label -1: from 0",
    b"9" * 5000: "needs its label",
    b"1_0": "needs its label",
    "\u0663".encode(): "needs its label",
    b"": "needs its label",
    b"0" * (1 << 20) + b"1": "a.cls of 1,048,577 bytes, 1,048,576 at most",
}


@pytest.mark.parametrize("label", LABELS, ids=lambda label: str(label)[:20])
def test_labels_that_can_be_none(tmp_path, label):
    write_shard(tmp_path / "train.tar", [("a.png", png(0)), ("a.cls", label)])
    with pytest.raises(DataError, match=LABELS[label]):
        open_set("wds/x", tmp_path)


@pytest.mark.parametrize(
    "label", ["3.7", "true", "null", "[1]", "1e999", "[" * 100_000, "9" * 5000]
)
def test_labels_of_json_that_can_be_none(tmp_path, label):
    content = f'{{"label": {label}}}'.encode()
    write_shard(tmp_path / "train.tar", [("a.png", png(0)), ("a.json", content)])
    with pytest.raises(DataError, match="sample a needs its label"):
        open_set("wds/x", tmp_path)


def pax(**headers):
    """A shard whose first member has these headers."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.pax_headers = headers
        tar.addfile(info)
        tar.addfile(tarfile.TarInfo("a.cls"))
    return buffer.getvalue()


def header_of(kind, size):
    """A header that announces ``size`` bytes of a name or of more headers."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


TARS = {
    "a size below zero": (pax(size="-1024"), "a.png has -1024 bytes"),
    "a long header": (pax(comment="x" * 70_000), "a header of 70,.* bytes, 65,536 at most"),
    "an endless number": (pax(comment="9" * 60_000), "a header with an endless number"),
    "headers of 20 GB": (header_of(tarfile.XHDTYPE, 20 << 30), "a header of 21,474,836,480 bytes"),
    "a name of 20 GB": (header_of(tarfile.GNUTYPE_LONGNAME, 20 << 30), "a header of 21,474,836,"),
    "headers of headers": (header_of(tarfile.XGLTYPE, 0) * 3000, "not a plain tar file"),
    "holes": (pax(**{"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}), "stored with holes"),
}


@pytest.mark.parametrize("name", TARS)
def test_a_hostile_tar_is_refused(tmp_path, name):
    content, message = TARS[name]
    (tmp_path / "train.tar").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_set("wds/x", tmp_path)


def test_a_shard_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "train.tar")
    with pytest.raises(DataError, match="a named pipe"):
        open_set("wds/x", tmp_path)


def test_a_sample_has_a_name_of_bounded_length(tmp_path):
    write_shard(tmp_path / "train.tar", [(f"{'x' * 1001}.png", b"x"), (f"{'x' * 1001}.cls", b"0")])
    with pytest.raises(DataError, match="has a name of 1,001 bytes, 1,000 at most"):
        open_set("wds/x", tmp_path)


def index_of(shard, **changed):
    """The index file of a shard of one image, in which some arrays are others."""
    arrays = {**ShardIndex.scan(shard)._asdict(), "shard": shard.name, **changed}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def promising(content, shape):
    """The index, in which the header of ``targets`` says another shape."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            body = old.read(name)
            if name == "targets.npy":
                body = body.replace(b"(1,), }" + b" " * 12, f"({shape},), }}".encode().ljust(19))
            new.writestr(name, body)
    return buffer.getvalue()


INDICES = {
    "an image beyond the end": ({"places": np.array([[512, 10**15]])}, "outside of the shard"),
    "a place below zero": ({"places": np.array([[-512, 10]])}, "outside of the shard"),
    "a sum that overflows": ({"places": np.array([[2**63 - 1, 2**63 - 1]])}, "outside of the"),
    "a label below zero": ({"targets": np.array([-1])}, "outside of the shard"),
    "a huge label": ({"targets": np.array([10**12])}, "label 1000000000000, 999999 at most"),
    "floats": ({"places": np.array([[512.0, 10.0]])}, "other types"),
    "long names": ({"keys": np.array([b"x" * 2000])}, "other types"),
    "more labels": ({"targets": np.zeros(2, int)}, "other shapes"),
    "objects": ({"keys": np.array([[1, []], 2], dtype=object)[:1]}, "is of another kind|Object"),
}


@pytest.mark.parametrize("name", INDICES)
def test_a_hostile_index_is_not_taken(tmp_path, caplog, name):
    changed, message = INDICES[name]
    write_shard(tmp_path / "train.tar", SAMPLE)
    ShardIndex.path(tmp_path / "train.tar").write_bytes(index_of(tmp_path / "train.tar", **changed))
    data = open_set("wds/x", tmp_path)
    assert data.targets.tolist() == [0] and torch.equal(data[0].image, expected(0))
    assert re.search(f"can't be read .*({message}).* the shard is scanned", caplog.text)


def test_an_index_of_another_form_is_not_unpacked(tmp_path, caplog, monkeypatch):
    shard = tmp_path / "train.tar"
    write_shard(shard, SAMPLE)
    path = ShardIndex.path(shard)
    whole = index_of(shard)
    path.write_bytes(whole)
    assert ShardIndex.read(shard).targets.tolist() == [0]
    path.write_bytes(promising(whole, 10**11))
    assert ShardIndex.read(shard) is None
    assert "8 bytes of targets instead of 800000000000" in caplog.text
    buffer = io.BytesIO(whole)
    with zipfile.ZipFile(buffer, "a") as archive:
        for number in range(1000):
            archive.writestr(f"entry with a rather long name {number}", b"")
    path.write_bytes(buffer.getvalue())
    assert ShardIndex.read(shard) is None and "not what numpy.savez writes" in caplog.text
    # Bit 0 of the flags of an entry (APPNOTE 4.4.4) says that it is encrypted.
    path.write_bytes(whole.replace(b"PK\1\2-\3-\0\0", b"PK\1\2-\3-\0\1"))
    assert ShardIndex.read(shard) is None and "is encrypted" in caplog.text
    monkeypatch.setattr(shard_index, "MOST_INDEX", 2000)
    path.write_bytes(index_of(shard, targets=np.zeros(10_000, int)))
    assert ShardIndex.read(shard) is None and "when unpacked, 1.95 KiB at most" in caplog.text


def test_an_image_of_gigabytes_is_not_read(tmp_path):
    shard = tmp_path / "train.tar"
    write_shard(shard, [("a.cls", b"0"), ("b.png", png(0)), ("b.cls", b"0")])
    with open(shard, "r+b") as file:  # the first image is a hole of 3 GiB
        info = tarfile.TarInfo("a.png")
        info.size = 3 << 30
        rest = file.read()
        file.seek(0)
        file.write(info.tobuf())
        file.seek(3 << 30, os.SEEK_CUR)
        file.write(rest)
    data = open_set("wds/x", tmp_path)
    assert torch.equal(data[1].image, expected(0))
    assert data[0].image is None
    assert data[0].bad == [f"{shard}:a: 3 GiB, and no more than 1 GiB is read of an image"]


def test_names_of_classes_are_a_list_of_short_texts(tmp_path):
    write_shard(tmp_path / "one.tar", SAMPLE)
    for classes in ("ab", [1], ["x" * 1001], {"a": 1}):
        info = {"splits": {"train": {"filenames": ["one.tar"]}}, "classes": classes}
        (tmp_path / "_info.json").write_text(json.dumps(info))
        with pytest.raises(DataError, match="'classes' is no list of names"):
            open_set("wds/x", tmp_path)
    for content in ("[" * 100_000, "1" * 5000, '{"a": '):
        (tmp_path / "_info.json").write_text(content)
        with pytest.raises(DataError, match="_info.json can't be read"):
            open_set("wds/x", tmp_path)
