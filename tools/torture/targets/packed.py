"""What the tools write and read again: raw packs, lists with groups, studies; what trackers get."""

import functools
import importlib.util
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import config
from config import DataOptions
from outputs.trackers.run_info import without_secrets
from pipeline.limits import BadImageError
from pipeline.sources.raw import INFO
from pipeline.sources.registry import open_source
from tools.data import pack
from tools.data.folds import deal_groups
from tools.data.groups import groups_of
from tools.data.split import read
from tools.torture.targets import Target
from tools.torture.targets.mutation import (
    changed,
    mutated,
    mutated_file,
    mutated_text,
    odd_text,
    odd_value,
)

# --- raw packs ------------------------------------------------------------------------------------


@functools.cache
def _pack() -> dict[str, bytes]:
    """The files of a small packed set, by name."""
    with tempfile.TemporaryDirectory() as temporary:
        images, packed = Path(temporary) / "images", Path(temporary) / "packed"
        for part in ("train", "val"):
            for number, name in enumerate(("cat", "dog")):
                (images / part / name).mkdir(parents=True)
                image = Image.new("RGB", (5, 4), (number, 2, 3))
                image.save(images / part / name / f"{number}.png")
        argv = ["--data-path", str(images), "--output-dir", str(packed), "--format", "raw"]
        assert pack.main(argv) == 0
        return {path.name: path.read_bytes() for path in packed.iterdir()}


def _raw(rng: random.Random) -> dict[str, bytes]:
    files = dict(_pack())
    name = rng.choice((INFO, INFO, *sorted(files)))
    if name == INFO and rng.random() < 0.7:
        files[name] = json.dumps(changed(rng, json.loads(files[name]))).encode("utf-8", "replace")
    else:
        files[name] = mutated(rng, [files[name]])
    return files


def _read_raw(files: dict[str, bytes], folder: Path) -> None:
    place = folder / "packed"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name, content in files.items():
        (place / name).write_bytes(content)
    usual = files[INFO] == _pack()[INFO]
    for is_train in (True, False):
        source = open_source(is_train, DataOptions(data_set="raw/x", data_path=str(place)), seed=0)
        for index in range(len(source)):
            source.identity(index)
            try:
                pixels = source.open(index)
            except BadImageError:
                continue
            # Checksums keep damage from becoming other pixels.
            assert not usual or (pixels == [int(source.targets[index]), 2, 3]).all()


# --- lists with groups ----------------------------------------------------------------------------

_LISTS = [
    "path,label,patient\n" + "".join(f"{i}.png,{'cd'[i % 2]},p{i // 2}\n" for i in range(6)),
    "image;class;site\n" + "".join(f"{i}.png;{i % 3};{i % 4}\n" for i in range(6)),
]
_PATTERNS = [r"(\d)\.png$", r"^(.*?)_", r"/([^/]+)\.", r"(?P<who>[a-z]+)\d?", r"\w"]


def _groups(rng: random.Random) -> tuple[bytes, str, str]:
    """A list, the column of its groups, or a pattern in its paths."""
    content = mutated_file(rng, _LISTS, 0.2)
    if rng.random() < 0.5:
        return content, rng.choice(("patient", "site", "label", "path", odd_text(rng))), ""
    return content, "", mutated_text(rng, _PATTERNS, 2)


def _deal(given: tuple[bytes, str, str], folder: Path) -> None:
    content, column, pattern = given
    for number in range(6):
        (folder / f"{number}.png").touch()
    (folder / "list.csv").write_bytes(content)
    rows, options = read(folder / "list.csv")
    paths = [path for path, _ in rows]
    groups = groups_of(paths, options, column, pattern)
    if groups is None or groups.max() < 1:
        return
    fold = deal_groups(groups, np.arange(len(paths)) % 2, [0.5, 0.5], 0)
    assert all(len(set(fold[groups == group])) == 1 for group in groups) and set(fold) == {0, 1}


# --- trackers -------------------------------------------------------------------------------------

_ADDRESSES = ["https://me:secret@host/x?X-Signature=secret", "s3://k:secret@b/p", "C:\\x", "a b"]


def _told(rng: random.Random) -> dict[str, Any]:
    recipe = config.resolve({}).recipe()
    for _ in range(rng.randrange(1, 5)):
        name = rng.choice(list(recipe))
        text = mutated_text(rng, _ADDRESSES, 2)
        recipe[name] = rng.choice((text, [text], odd_value(rng, 2), odd_text(rng)))
    return recipe


def _tell(recipe: dict[str, Any], folder: Path) -> None:
    found = without_secrets(recipe)
    json.dumps(found).encode()
    assert found.keys() == recipe.keys() and without_secrets(found) == found or "nan" in str(found)


# --- studies --------------------------------------------------------------------------------------


@functools.cache
def _axes() -> tuple[Any, ...]:
    from tools.tune.space import read_space

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "space.yaml"
        path.write_text("lr: {low: 1e-4, high: 1e-2, log: true}\nopt: [adamw, sgd]\n")
        return tuple(read_space(path))


def _open_study(folder: Path) -> Any:
    from tools.tune.study import Study

    return Study(config.resolve({}), _axes(), folder, pruner=None, seed=0, grid=False)


@functools.cache
def _database() -> bytes:
    """A study with a trial that is done and one that was left."""
    with tempfile.TemporaryDirectory() as temporary:
        study = _open_study(Path(temporary))
        for value in (50.0, None):
            trial = study.study.ask()
            for axis in _axes():
                axis.draw(trial)
            if value is not None:
                study.study.tell(trial, value)
        return (Path(temporary) / "study.db").read_bytes()


def _study(rng: random.Random) -> bytes:
    return mutated(rng, [_database()], 2 + 30 * (rng.random() < 0.5))


def _read_study(content: bytes, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        (Path(temporary) / "study.db").write_bytes(content)
        study = _open_study(Path(temporary))
        for trial in study.completed():
            study.values_of(trial)


TARGETS = [
    Target("raw packs", _raw, _read_raw, share=0.3),
    Target("lists with groups", _groups, _deal, share=0.5),
    Target("what trackers are told", _told, _tell, share=0.2),
]
if importlib.util.find_spec("optuna"):
    TARGETS.append(Target("studies", _study, _read_study, share=0.02))
