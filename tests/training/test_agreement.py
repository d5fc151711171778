"""Processes that differ in options, images or weights say so, all with the same words."""

import hashlib
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import arguments, on_each_process

import checkpointing.folder
import main
import training.agreement as agreement
from config import all_options, load
from distributed.processes import Processes
from errors import UserError
from pipeline.dataset import ImageDataset
from pipeline.sources.base import ArraySource, FileSource, Subset
from tools.torture.processes import kill, start, wait
from training.agreement import (
    PLACES,
    agree_on_data,
    agree_on_start,
    agree_on_weights,
    await_newest,
    recipe_terms,
    warn_of_versions,
)

WORLD = 3
CPU = torch.device("cpu")


def said_by_all(folder: Path, ask: dict[str, Any]) -> dict[str, str]:
    """What each of the calls raises on three processes, the same on all; "" for nothing.

    A call gets where its process stands, and is the odd one on rank 2.
    """

    def work(rank: int) -> dict[str, str]:
        said = {}
        for name, call in ask.items():
            said[name] = ""
            try:
                call(Processes(rank, WORLD, hosts=("a", "a", "b")))
            except UserError as error:
                said[name] = str(error)
        return said

    one, two, odd = on_each_process(folder, WORLD, work)
    assert one == two == odd
    return one


def files(root: str, *names: str, classes: tuple[str, ...] = ("cat", "dog")) -> ImageDataset:
    """A data set of files, whose label is in their folder's name."""
    return ImageDataset(FileSource(Path(root), names, [int(n[0]) for n in names], list(classes)))


NAMES = tuple(f"{i % 2}/{i}.png" for i in range(9000))


def beginnings() -> dict[str, str]:
    """What :func:`test_data_that_differ` is told of each case begins with."""
    others = "ranks 0, 1 (host a) have"
    return {
        "same": "",
        "classes": f"rank 2 (host b) has class 1 'fox', {others} class 1 'dog': give all",
        "more classes": f"rank 2 (host b) has class 2 'eel', {others} no class 2: give all",
        "fewer": f"rank 2 (host b) has 8,999 training images, {others} 9,000 training images; the "
        "first training image that differs: rank 2 (host b) has 1/5001.png of class 'dog', "
        f"{others} 0/5000.png of class 'cat': give all",
        "last": "the first training image that differs: rank 2 (host b) has 1/z.png of class "
        f"'dog', {others} 1/8999.png of class 'dog': give all",
        "label": "the first training image that differs: rank 2 (host b) has 0/0.png of class "
        f"'dog', {others} 0/0.png of class 'cat': give all",
        "part": "the first training image that differs: rank 2 (host b) has 1/1.png of class "
        f"'dog', {others} 0/0.png of class 'cat': give all",
        "size": f"rank 2 (host b) has 0/0.png of 6 bytes, {others} 0/0.png of -1 bytes: give all",
        "array": "",
        "labels of an array": "the first training image that differs: rank 2 (host b) has ",
        "several labels": "",
        "one of several": "the first training image that differs: rank 2 (host b) has 1.png with "
        f"labels 'dog', {others} 1.png with labels 'cat', 'dog': give all",
        "none of several": "the first training image that differs: rank 2 (host b) has 2.png with "
        f"labels 'cat', {others} 2.png with no label: give all",
    }


def test_data_that_differ(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "0").mkdir()
    (tmp_path / "x" / "0" / "0.png").write_bytes(b"longer")

    def asks(usual: ImageDataset, odd: ImageDataset, root: str = ""):
        return lambda p: agree_on_data(p, {"training": odd if p.rank == 2 else usual}, root)

    whole = files("/a", *NAMES)
    moved = FileSource(Path("/a"), NAMES, [1, *(int(n[0]) for n in NAMES[1:])], ["cat", "dog"])
    some = np.arange(0, 9000, 3)
    pixels = np.zeros((9000, 2, 2), dtype=np.uint8)
    array = ArraySource(pixels, [0] * 9000, ["cat"], "array")
    labels = ArraySource(pixels, [0] * 8999 + [1], ["cat"], "array")

    def several(*rows: tuple[int, int]) -> ImageDataset:
        paths = [f"{i}.png" for i in range(len(rows))]
        source = FileSource(Path("/a"), paths, [0] * len(rows), ["cat", "dog"])
        source.targets = np.array(rows, dtype=np.uint8)
        return ImageDataset(source)

    both = several((1, 0), (1, 1), (0, 0))
    said = said_by_all(
        tmp_path,
        {
            "same": asks(whole, files("/elsewhere", *NAMES)),
            "classes": asks(whole, files("/a", *NAMES, classes=("cat", "fox"))),
            "more classes": asks(whole, files("/a", *NAMES, classes=("cat", "dog", "eel"))),
            "fewer": asks(whole, files("/a", *NAMES[:5000], *NAMES[5001:])),
            "last": asks(whole, files("/a", *NAMES[:-1], "1/z.png")),
            "label": asks(whole, ImageDataset(moved)),
            "part": asks(ImageDataset(Subset(whole.source, some)), whole.subset(some + 1)),
            "size": asks(files("/nowhere", "0/0.png"), files(str(tmp_path / "x"), "0/0.png")),
            "array": asks(ImageDataset(array), ImageDataset(array)),
            "labels of an array": asks(ImageDataset(array), ImageDataset(labels)),
            "several labels": asks(both, several((1, 0), (1, 1), (0, 0))),
            "one of several": asks(both, several((1, 0), (0, 1), (0, 0))),
            "none of several": asks(both, several((1, 0), (1, 1), (1, 0))),
        },
    )
    starts = beginnings()
    for name, start_of in starts.items():
        assert said[name].startswith(start_of) and bool(said[name]) == bool(start_of), said[name]


def test_weights_and_checkpoints_that_differ(tmp_path):
    weights = {"a": torch.ones(3), "b.weight": torch.zeros(2, 2), "n": torch.tensor(1)}
    other = weights | {"b.weight": torch.tensor([[0.0, 0.0], [0.0, 1e-30]])}
    content = {"progress": {"epoch": 3, "update": 18}, "model": weights}

    def asks(usual: Any, odd: Any, call: Any):
        return lambda p: call(p, odd if p.rank == 2 else usual)

    def begin(p: Processes, start: tuple[str | None, dict]) -> None:
        agree_on_start(p, *start, scattered=False)

    def begin_scattered(p: Processes, start: tuple[str | None, dict]) -> None:
        agree_on_start(p, *start, scattered=True)

    def compare(p: Processes, mine: dict) -> None:
        agree_on_weights(p, mine, "start from")

    here, there = ("/x/checkpoint-0003.pth", content), ("/y/checkpoint-0003.pth", content)
    said = said_by_all(
        tmp_path,
        {
            "same": asks(weights, dict(weights), compare),
            "a bit": asks(weights, other, compare),
            "shape": asks(weights, weights | {"a": torch.ones(3, 1)}, compare),
            "a layer": asks(weights, {"a": weights["a"], "n": weights["n"]}, compare),
            "another place": asks(here, there, begin),
            "anew": asks(here, (None, {}), begin),
            "content": asks(here, (here[0], content | {"model": other}), begin),
            "shards": asks(here, (here[0], content | {"model": other}), begin_scattered),
            "odd fields": asks((here[0], {"progress": 3, "model": "x"}), here, begin),
        },
    )
    assert said["same"] == said["another place"] == said["shards"] == ""
    assert "rank 2 (host b) has layer b.weight" in said["a bit"]
    assert "rank 2 (host b) has layer a" in said["shape"] and "[3, 1]" in said["shape"]
    assert "rank 2 (host b) has no layer b.weight" in said["a layer"]
    assert said["anew"].startswith(
        "rank 2 (host b) starts anew, ranks 0, 1 (host a) go on from checkpoint-0003.pth (3 epochs"
    )
    assert "rank 2 (host b) goes on from checkpoint-0003.pth" in said["content"]
    assert said["odd fields"]


OTHERS = {
    "lr": 0.3,
    "seed": 5,
    "opt": "sgd",
    "amp": "bf16",
    "batch_size": 7,
    "epochs": 9,
    "model": "resnet18",
    "model_ema": False,
    "accum_steps": 3,
    "resume": "auto",
    "fsdp": True,
    "plugin": ("a.py",),
    "device": "cuda",
    "dist_eval": False,
}


@pytest.mark.parametrize("name", OTHERS)
def test_options_that_matter_are_compared(name):
    config = load([])
    changed = config.replace("test", **{name: OTHERS[name]})
    device = torch.device("meta") if name == "device" else CPU
    before, after = recipe_terms(config, CPU), recipe_terms(changed, device)
    assert [k for k in before if before[k] != after[k]] == [f"--{name.replace('_', '-')}"]


def test_places_may_differ(tmp_path):
    """So may the name of a file: what is in it is compared."""
    values = {name: str(tmp_path / name) for name in PLACES}
    plugins = [tmp_path / "one.py", tmp_path / "b" / "one.py"]
    plugins[1].parent.mkdir()
    terms = []
    for number, plugin in enumerate(plugins):
        plugin.write_text("x = 1\n")
        mine = {name: f"{value}{number}" for name, value in values.items()}
        mine |= {"resume": f"/{number}.pth", "finetune": f"/{number}.pth", "num_workers": number}
        config = load([]).replace("test", **mine, plugin=(str(plugin),))
        terms.append(recipe_terms(config, CPU))
    assert terms[0] == terms[1]
    plugins[0].write_text("x = 2\n")
    assert recipe_terms(config.replace("test", plugin=(str(plugins[0]),)), CPU) != terms[1]
    assert {option.name for option in all_options()} > PLACES
    # All processes write into the folder of sharded checkpoints.
    sharded = config.replace("test", fsdp=True)
    moved = replace(sharded, run=replace(sharded.run, output_dir="/elsewhere"))
    assert recipe_terms(sharded, CPU)["--output-dir"] != recipe_terms(moved, CPU)["--output-dir"]


@pytest.mark.parametrize(
    "name",
    sorted(agreement._LABEL_FILES | agreement._NAMED_FILES),
)
def test_the_content_of_a_file_is_compared(tmp_path, name):
    """Which may lie elsewhere; a pipe is not waited for."""
    files = [tmp_path / text / "x.txt" for text in ("one", "same", "other", "pipe")]
    for file in files:
        file.parent.mkdir()
        file.write_text("cat 2\n" if file.parent.name == "other" else "cat 1\n")
    files[3].unlink()
    os.mkfifo(files[3])
    flag = f"--{name.replace('_', '-')}"
    config = load([])
    one, same, other, pipe = (
        recipe_terms(config.replace("test", **{name: str(file)}), CPU) for file in files
    )
    assert one == same
    assert all([k for k in one if one[k] != terms[k]] == [flag] for terms in (other, pipe))


@pytest.mark.parametrize(
    "name, usual, minor, major",
    [
        ("python", "3.11.7", "3.11.9", "3.12.7"),
        ("torch", "2.9.1+cu128", "2.9.0+cpu", "2.10.0"),
        ("timm", "1.0.19", "1.0.19+local", "1.0.20"),
    ],
)
def test_small_differences_of_versions_are_only_told(
    tmp_path, monkeypatch, name, usual, minor, major
):
    config, known = load([]), agreement.versions()
    terms = []
    for value in (usual, minor, major):
        monkeypatch.setattr(agreement, "versions", lambda value=value: known | {name: value})
        terms.append(recipe_terms(config, CPU))
    assert terms[0] == terms[1]
    assert [k for k in terms[0] if terms[0][k] != terms[2][k]] == [name]

    def work(rank: int) -> list[str]:
        said: list[str] = []
        monkeypatch.setattr(agreement, "versions", lambda: known | {name: (usual, minor)[rank]})
        monkeypatch.setattr(
            agreement.log, "warning", lambda text, *values: said.append(text % values)
        )
        warn_of_versions(Processes(rank, 2, hosts=("a", "b")))
        return said

    said, same = on_each_process(tmp_path, 2, work)
    expected = f"rank 1 (host b) has {name} {minor}, rank 0 (host a) has {name} {usual}"
    assert said == same == [f"{expected}: the same version everywhere is safer"]


def test_code_that_is_loaded_is_compared():
    """By the content of each file; what else lies in the folder of the project is not."""
    terms = recipe_terms(load([]), CPU)
    for module in (agreement, checkpointing.folder, main):
        path = Path(module.__file__)
        name = path.relative_to(Path(main.__file__).parent).as_posix()
        assert terms[name] == f"content {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    assert "tests/runs.py" not in terms
    for name in ("hubconf", "run_with_submitit"):
        assert (f"{name}.py" in terms) == (name in sys.modules)


def test_a_checkpoint_that_storage_shows_late_is_waited_for(tmp_path):
    """Rank 1 sees another folder, into which the newest one comes later."""
    for rank, newest in enumerate((3, 2)):
        (tmp_path / f"run{rank}").mkdir()
        (tmp_path / f"run{rank}" / f"checkpoint-000{newest}.pth").touch()

    def work(rank: int) -> float:
        folder = tmp_path / f"run{rank}"
        threading.Timer(0.7, (tmp_path / "run1" / "checkpoint-0003.pth").touch).start()
        began = time.monotonic()
        await_newest(Processes(rank, 2), folder, 30.0)
        return time.monotonic() - began

    first, second = on_each_process(tmp_path, 2, work)
    assert first < 0.5 < second < 10


def test_a_run_ends_before_its_data_are_looked_at(images, tmp_path):
    """With one line on each process, though there are no data."""
    pids = []
    for rank in range(2):
        argv = arguments(tmp_path / "nothing", tmp_path / "run", "--lr", f"0.{rank + 1}")
        where = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        argv += ["--dist-url", f"file://{tmp_path}/meet"]
        pids += start(argv, 1, tmp_path / f"{rank}.txt", where)
    codes = wait(pids, time.monotonic() + 120)
    if codes is None:
        kill(pids)
    assert codes == [2, 2]
    texts = {(tmp_path / f"{rank}.txt").read_text() for rank in range(2)}
    assert len(texts) == 1
    text = texts.pop()
    assert text.startswith("error: rank 1 (host ") and text.count("\n") == 1, text
    assert "has --lr 0.2, rank 0 (host " in text and "has --lr 0.1: start all" in text
