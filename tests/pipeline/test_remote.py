"""pipeline/remote.py, and sharded sets from an address: fetched once, and whole."""

import functools
import http.server
import json
import multiprocessing
import shutil
import threading
from collections import Counter
from pathlib import Path

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
        threading.Thread(target=server.serve_forever, daemon=True).start()
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


@pytest.mark.parametrize("name", ["../other.tar", "/etc/other.tar", ""])
def test_names_that_leave_the_folder_are_refused(shards, tmp_path, serve, name):
    folder = shutil.copytree(shards, tmp_path / "copy")
    info = json.loads((folder / "_info.json").read_text())
    info["splits"]["train"]["filenames"][0] = name
    (folder / "_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="is not the name of a file in it"):
        open_part(serve(folder)[0], tmp_path / "cache")


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
