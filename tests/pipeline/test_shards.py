"""pipeline/sources/shards.py: tar shards in WebDataset's form."""

import gzip
import io
import json
import tarfile

import pytest
import torch
from PIL import Image
from tiny_sets import assert_same, expected, load, noise, open_set

from errors import DataError, OptionError
from samplers import RASampler


def png(seed):
    buffer = io.BytesIO()
    Image.fromarray(noise(seed)).save(buffer, "PNG")
    return buffer.getvalue()


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
