"""Several labels per image: tables, shards, thresholds. Words and files of the options beside them.

A table or a shard that is read gives each image one vector of zeros and ones.
"""

import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from config import DataOptions
from config.class_weights import parse_class_weights
from config.keywords import keywords
from config.train_sizes import stages
from pipeline.sources.base import Source
from pipeline.sources.registry import open_source
from tools.torture.targets import Target
from tools.torture.targets.mutation import (
    changed,
    mutated,
    mutated_file,
    mutated_text,
    odd_text,
    odd_value,
)
from training.class_weights import read_class_weights

_CLASSES = ["cat", "dog", "n01440764 tench", "é", "3"]
_NAMES = ("a.png", "b.jpg", "c.png", "d.png")


def _check(source: Source) -> None:
    """What training asks of labels."""
    targets = source.targets
    assert targets.shape == (len(source), len(source.classes)) and targets.dtype == np.uint8
    assert targets.size == 0 or targets.max() <= 1
    assert len(set(source.classes)) == len(source.classes)


# --- tables ---------------------------------------------------------------------------------------

_TABLES = [
    "path,labels\na.png,cat|dog\nb.jpg,\nc.png,dog\nd.png,cat\n",
    "path;labels\na.png;cat,dog\nb.jpg;\nc.png;dog\nd.png;cat, ant\n",
    'path,labels\na.png,"[""cat"", ""dog""]"\nb.jpg,[]\nc.png,"[""é""]"\nd.png,"[1, 2]"\n',
    "path,cat,dog,é\na.png,1,0,1\nb.jpg,0,0,0\nc.png,0,1,0\nd.png,1,1,1\n",
    "image\tsplit\ttags\na.png\ttrain\tx y\nb.jpg\tval\ty\nc.png\ttrain\t\nd.png\tval\tx\n",
]
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "label_separator": ("|", ",", ";", "", " "),
    "label_columns": (("cat", "dog"), ("*",), ("cat*",), ("nowhere",), ("path",)),
    "label_column": ("labels", "none"),
    "split_column": ("split", "none"),
}


def _table(rng: random.Random) -> tuple[bytes, dict[str, Any]]:
    content = mutated_file(rng, _TABLES, 0.2)
    names = rng.sample(list(_OPTIONS), rng.choice((0, 0, 1, 2)))
    options = {name: rng.choice(_OPTIONS[name]) for name in names}
    return content, options if b"split" in content else {"val_fraction": 0.5, **options}


def _read_table(given: tuple[bytes, dict[str, Any]], folder: Path) -> None:
    content, options = given
    for name in _NAMES:
        (folder / name).touch()
    path = folder / "list.csv"
    path.write_bytes(content)
    data = DataOptions(
        task="multilabel",
        data_set="CSV",
        data_path=str(path),
        on_bad_image="skip",
        **options,
    )
    for is_train in (True, False):
        _check(open_source(is_train, data, seed=0))


# --- shards ---------------------------------------------------------------------------------------

_LABELS = [{"labels": ["cat", "dog"]}, {"label": 1}, {"tags": []}, ["cat"], {"labels": [0, 2]}]


def _labels(rng: random.Random) -> tuple[str, bytes]:
    """The name's ending of a sample's labels, and what is in it."""
    if rng.random() < 0.4:
        text = mutated_text(rng, ["0 1", "cat,dog", "", '["cat"]', "3\n4\n"])
        return ".cls", text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.3:
        return ".json", mutated(rng, [json.dumps(value).encode() for value in _LABELS])
    value = changed(rng, rng.choice(_LABELS)) if rng.random() < 0.8 else odd_value(rng)
    return ".json", json.dumps(value).encode()


def _shard(rng: random.Random) -> list[tuple[str, bytes]]:
    return [_labels(rng), rng.choice((_labels(rng), (".cls", b"1")))]


def _read_shard(given: list[tuple[str, bytes]], folder: Path) -> None:
    for part in ("train", "val"):
        place = folder / "set" / part
        place.mkdir(parents=True, exist_ok=True)
        for old in place.iterdir():
            old.unlink()
        with tarfile.open(place / "0.tar", "w") as tar:
            for number, (ending, content) in enumerate(given):
                for name, data in ((f"s{number}.png", b"image"), (f"s{number}{ending}", content)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    data = DataOptions(task="multilabel", data_set="wds/x", data_path=str(folder / "set"))
    for is_train in (True, False):
        _check(open_source(is_train, data, seed=0))


# --- words ----------------------------------------------------------------------------------------

_WORDS = {
    "class_weights": ["balanced", "effective:0.999", "cat=2,dog=0.5", "weights.csv", "none"],
    "train_sizes": ["128:0", "160x96:30", "224:60"],
    "model_kwargs": ["depth=4", "drop_rate=0.1", "layers=[2, 2]", "name='x'", "on=true"],
    "opt_kwargs": ["alpha=0.9", "betas=(0.9, 0.99)", "nesterov=yes"],
}


def _words(rng: random.Random) -> tuple[str, list[str]]:
    option = rng.choice(list(_WORDS))
    count = 1 if option == "class_weights" else rng.choice((1, 2, 3))
    texts = [mutated_text(rng, _WORDS[option]) for _ in range(count)]
    return option, [odd_text(rng) if rng.random() < 0.1 else text for text in texts]


def _read_words(given: tuple[str, list[str]], folder: Path) -> None:
    option, texts = given
    if option == "class_weights":
        found = parse_class_weights(texts[0])
        assert all(weight > 0 for _, weight in found.named) and 0 <= found.beta < 1
    elif option == "train_sizes":
        assert all(min(stage.size) > 0 and stage.epoch >= 0 for stage in stages(texts))
    else:
        assert all(name.isidentifier() for name in keywords(option, texts))


# --- weights of classes ---------------------------------------------------------------------------

_WEIGHTS = {
    ".csv": ["class,weight\ncat,1\ndog,0.5\n", "cat,2\nn01440764 tench,1e-3\n"],
    ".tsv": ["cat\t1\né\t2\n"],
    ".txt": ["cat 1\nn01440764 tench 2\n3 4\n", "\ufeffdog\t0.5\r\n"],
    ".json": ['{"cat": 1, "dog": 0.5}', '{"n01440764 tench": 2, "3": 1e3}'],
}


def _weights(rng: random.Random) -> tuple[str, bytes]:
    ending = rng.choice(list(_WEIGHTS))
    return ending, mutated_file(rng, _WEIGHTS[ending], 0.3)


def _read_weights(given: tuple[str, bytes], folder: Path) -> None:
    ending, content = given
    path = folder / f"weights{ending}"
    path.write_bytes(content)
    found = read_class_weights(str(path), _CLASSES)
    assert found and found.keys() <= set(_CLASSES)
    assert all(0 < weight < float("inf") for weight in found.values())


TARGETS = [
    Target("tables of several labels", _table, _read_table, share=0.5),
    Target("shards of several labels", _shard, _read_shard, share=0.3),
    Target("words of options", _words, _read_words),
    Target("class weights", _weights, _read_weights),
]
