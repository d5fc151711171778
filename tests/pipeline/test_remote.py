"""pipeline/remote.py, and sharded sets from an address: fetched once, and whole."""

import functools
import http.server
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_images import image_folder

import main as program
from checkpointing.folder import checkpoints_in, load_newest
from config import DataOptions
from errors import DataError, OptionError
from pipeline.dataset import build_dataset
from pipeline.decoding import decode
from pipeline.remote import RemoteFolder
from tools.data.__main__ import main as data_tool


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, notes what is asked for, and fails as ``broken`` says."""

    asked: Counter
    broken: dict[str, int]  # answers to come that break off, by file name

    def do_GET(self):
        name = Path(self.path).name
        self.asked[name] += 1
        if self.broken.get(name, 0) > 0:
            self.broken[name] -= 1
            content = (Path(self.directory) / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            return
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """serve(folder) -> (address, what was asked for, what is to break)."""
    servers = []

    def start(folder):
        kind = type("Own", (Handler,), {"asked": Counter(), "broken": {}})
        handler = functools.partial(kind, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", kind.asked, kind.broken

    yield start
    for server in servers:
        server.shutdown()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """30 training and 9 validation images in packed shards of a few each."""
    root = tmp_path_factory.mktemp("images")
    classes = ("class0", "class1", "class2")
    image_folder(root, {"train": 10, "val": 3}, classes=classes)
    folder = tmp_path_factory.mktemp("packed") / "shards"
    argv = ["pack", "--data-path", str(root), "--output-dir", str(folder), "--shard-size", "0.006"]
    assert data_tool(argv) == 0
    assert len(list(folder.glob("train*.tar"))) >= 5
    return folder


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def open_part(address, cache, is_train=True, **options):
    options = DataOptions(
        data_set="wds/x", data_path=str(address), shard_cache=str(cache), **options
    )
    return build_dataset(is_train, options, seed=0).source


def contents(source):
    return [(np.array(decode(p)).tobytes(), t) for p, t in map(source.read, range(len(source)))]


# --- fetching -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["http", "fsspec"])
def test_remote_images_are_those_of_the_folder(shards, tmp_path, serve, kind):
    address = serve(shards)[0] if kind == "http" else f"file://{shards}"
    for is_train in (True, False):
        far = open_part(address, tmp_path / "cache", is_train)
        near = open_part(shards, tmp_path, is_train)
        assert far.classes == near.classes == ["class0", "class1", "class2"]
        assert np.array_equal(far.targets, near.targets)
        assert contents(far) == contents(near)
        assert far.sample_id(0).endswith(near.sample_id(0).split("/")[-1])


def test_any_number_of_labels_is_in_the_index(shards, tmp_path, serve):
    image_folder(tmp_path, {"train": 4, "val": 4}, classes=("x",))
    for part in ("train", "val"):
        labels = ("a|b", "", "b", "a|c")
        rows = [f"{part}/x/{i}.png,{text}\n" for i, text in enumerate(labels)]
        (tmp_path / f"{part}.csv").write_text("path,labels\n" + "".join(rows))
    folder, several = tmp_path / "packed", ["--task", "multilabel"]
    argv = ["pack", *several, "--data-set", "CSV", "--data-path", str(tmp_path)]
    assert data_tool([*argv, "--output-dir", str(folder)]) == 0
    address, asked, _ = serve(folder)
    far = [open_part(address, tmp_path / "cache", p, task="multilabel") for p in (True, False)]
    assert not any(name.endswith(".tar") for name in asked)
    with pytest.raises(OptionError, match="any number of labels: add --task multilabel"):
        open_part(address, tmp_path / "cache")
    for index in folder.glob("*.npz"):
        index.unlink()  # the tar files are scanned
    for part, source in zip((True, False), far, strict=True):
        near = open_part(folder, tmp_path, part, task="multilabel")
        assert source.classes == near.classes == ["a", "b", "c"]
        assert source.targets.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 1]]
        assert np.array_equal(near.targets, source.targets)
        assert np.array_equal(near.read(3)[1], source.read(3)[1])
    with pytest.raises(DataError, match="one label of each image: pack the set again"):
        open_part(serve(shards)[0], tmp_path / "other", task="multilabel")


def test_names_do_not_depend_on_where_copies_lie(shards, tmp_path, serve):
    """Processes compare them, and each machine may have a folder of its own."""
    address = serve(shards)[0]
    one, two = (open_part(address, tmp_path / name) for name in ("a", "b"))
    names = [[source.identity(i) for i in range(len(source))] for source in (one, two)]
    assert names[0] == names[1] and len(set(names[0])) == len(names[0])
    assert one.sample_id(0) != two.sample_id(0)


def test_a_shard_is_fetched_when_it_is_needed_and_only_once(shards, tmp_path, serve):
    address, asked, _ = serve(shards)
    source = open_part(address, tmp_path)
    assert not any(name.endswith(".tar") for name in asked)
    first = source.shards[0].name
    source.open(0)
    assert [n for n in asked if n.endswith(".tar")] == [first]
    contents(source)
    contents(open_part(address, tmp_path))
    assert {asked[s.name] for s in source.shards} == {1}


def _read_all(address, cache):
    open_part(address, cache).open(0)


def test_processes_share_a_copy(shards, tmp_path, serve):
    address, asked, _ = serve(shards)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_read_all, args=(address, tmp_path)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert asked[open_part(address, tmp_path).shards[0].name] == 1


def test_a_transfer_that_breaks_off_is_tried_again(shards, tmp_path, serve):
    address, asked, broken = serve(shards)
    source = open_part(address, tmp_path)
    name = source.shards[0].name
    broken[name] = 2
    assert contents(source) == contents(open_part(shards, tmp_path))
    assert asked[name] == 3
    assert not list(tmp_path.rglob("*.tmp*"))


def test_a_shard_that_does_not_come_is_named(shards, tmp_path, serve):
    address, _, broken = serve(shards)
    source = open_part(address, tmp_path)
    broken[source.shards[0].name] = 99
    with pytest.raises(OSError, match=rf"{address}/{source.shards[0].name} can't be fetched: "):
        source.open(0)
    assert not source.shards[0].exists()


def test_what_is_missing_is_named(shards, tmp_path, serve):
    folder = shutil.copytree(shards, tmp_path / "copy")
    address, _, _ = serve(folder)
    next(folder.glob("train*.npz")).unlink()
    with pytest.raises(DataError, match=r"index.npz can't be fetched.*data pack writes the index"):
        open_part(address, tmp_path / "a")
    (folder / "_info.json").unlink()
    with pytest.raises(OptionError, match=r"--data-path: .*_info.json can't be fetched"):
        open_part(address, tmp_path / "b")


def listing(*names: object) -> dict[str, Any]:
    return {"splits": {"train": {"filenames": list(names)}}}


@pytest.mark.parametrize(
    "info",
    [
        *map(listing, ["../o.tar", "/etc/o.tar", "", "..", ".", ".hidden.tar", "a/.b/c.tar"]),
        *map(listing, ["a\0.tar", "a\\b.tar", "a\nb.tar", "\x1b[2J.tar", "\ud800.tar", "a.zip"]),
        *map(listing, [None, 7, ["a.tar"], {}, "a" * 300 + ".tar", "a/" * 5000 + "b.tar"]),
        listing("a.tar", "b.tar", "a.tar"),
        listing(*(f"{i}.tar" for i in range(1_000_000))),
        {"splits": {"train": {"filenames": "a.tar"}}},
        {"splits": {"train": ["a.tar"]}},
        {"splits": {"train": None}},
        {"splits": ["train"]},
        {"splits": None},
        [],
        "text",
        None,
        {**listing("a.tar"), "classes": "cat"},
        {**listing("a.tar"), "classes": [1, 2]},
    ],
    ids=lambda info: str(info)[:60],
)
def test_listings_that_are_none(tmp_path, info):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError) as caught:
        open_part(f"file://{tmp_path}/far", tmp_path / "cache")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    assert [p.name for p in tmp_path.rglob("*.tar*")] == []


def test_bounds_of_what_is_fetched(shards, tmp_path, serve, monkeypatch):
    address, asked, _ = serve(shards)
    monkeypatch.setattr("pipeline.sources.shards.LISTING_BYTES", 100)
    with pytest.raises(OptionError, match="and at most 100 are fetched"):
        open_part(address, tmp_path / "a")
    monkeypatch.setattr("pipeline.sources.shards.LISTING_BYTES", 1 << 20)
    monkeypatch.setattr("pipeline.sources.shards.INDEX_BYTES", 100)
    with pytest.raises(DataError, match="and at most 100 are fetched"):
        open_part(address, tmp_path / "b")
    assert max(asked.values()) == 2  # not tried again: the listing was fetched for each
    monkeypatch.setattr("pipeline.sources.shards.INDEX_BYTES", 1 << 20)
    source = open_part(address, tmp_path / "c", shard_cache_gb=1e-6)
    with pytest.raises(OSError, match=r"raise --shard-cache-gb"):
        source.open(0)
    assert not list(tmp_path.rglob("*.tar"))


@pytest.mark.parametrize("kind", ["link", "open", "file", "other"])
def test_a_folder_that_someone_else_prepared(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / f"shards-{os.getuid()}"
    elsewhere = tmp_path / "elsewhere"
    if kind == "link":
        elsewhere.mkdir()
        folder.symlink_to(elsewhere)
    elif kind == "file":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod(0o770 if kind == "open" else 0o700)
    if kind == "other":
        other = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: other)
        folder.rename(tmp_path / f"shards-{other}")
    with pytest.raises(DataError, match="not a folder of this user alone.*--shard-cache"):
        RemoteFolder("http://127.0.0.1:9")
    assert not list(elsewhere.glob("*"))


def test_the_default_folder_is_this_users_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    for _ in range(2):
        remote = RemoteFolder("http://127.0.0.1:9")
    assert remote.folder.parent == tmp_path / f"shards-{os.getuid()}"
    assert remote.folder.parent.stat().st_mode & 0o777 == 0o700


def test_a_lock_that_is_a_link_is_not_followed(shards, tmp_path, serve):
    address, _, _ = serve(shards)
    remote = RemoteFolder(address, str(tmp_path / "cache"))
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (remote.folder / "._info.json.lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        remote.fetch("_info.json")
    assert victim.read_text() == "precious"


def test_copies_make_room_for_others(shards, tmp_path, serve):
    address, asked, _ = serve(shards)
    size = max(s.stat().st_size for s in shards.glob("train*.tar"))
    source = open_part(address, tmp_path, shard_cache_gb=2.5 * size / 1e9)
    expected = contents(open_part(shards, tmp_path))
    assert contents(source) == expected
    kept = {p.name for p in tmp_path.rglob("*.tar")}
    assert kept == {s.name for s in source.shards[-2:]}
    assert contents(source) == expected  # those that went are open still, or come again


def test_a_folder_that_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="name another with --shard-cache"):
        RemoteFolder("http://127.0.0.1:9", str(tmp_path / "file"))


# --- a run --------------------------------------------------------------------------------------


def test_training_from_an_address_resumes_exactly(shards, tmp_path, serve):
    address, _, _ = serve(shards)
    base = ["--data-set", "wds/x", "--model", "deit_nano_patch4_32", "--input-size", "8"]
    base += ["--batch-size", "4", "--epochs", "2", "--warmup-epochs", "0", "--device", "cpu"]
    base += ["--no-tensorboard", "--no-repeated-aug", "--save-every-steps", "3", "--keep", "20"]

    def run(folder, path, *more):
        argv = [*base, "--data-path", str(path), "--output-dir", str(folder), *more]
        assert program.main([*argv, "--shard-cache", str(tmp_path / "cache")]) == 0
        return load_newest(folder)[1]["model"]

    far = run(tmp_path / "far", address, "--num-workers", "2")
    near = run(tmp_path / "near", shards, "--num-workers", "0")
    middle = next(p for p in checkpoints_in(tmp_path / "far") if "-" in p.stem[11:])
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(middle, other)
    shutil.copy(tmp_path / "far" / "log.txt", other)
    resumed = run(other, address, "--resume", "auto", "--num-workers", "1")
    for name, weight in far.items():
        assert torch.equal(weight, near[name]), name
        assert torch.equal(weight, resumed[name]), name
