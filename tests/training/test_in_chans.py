"""Runs on images of five bands, from the files to answers and exports."""

import json
import shlex
import tarfile

import numpy as np
import pytest
import tifffile
import torch
from runs import assert_same_state, newest, stopped_after, train

from config import load
from inference import load_for_inference
from tools import predict, report
from tools.data import explore, pack
from tools.serve.images import RefusedError, decoded
from tools.serve.schema import openapi

BANDS = 5
OPTIONS = ("--in-chans", "5", "--no-repeated-aug", "--vflip", "0.5", "--epochs", "2")
DEEP = (*OPTIONS, "--bit-depth", "16", "--rotate", "20", "--perspective", "0.4", "--blur-prob", "1")


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    """24 training and 8 validation images of two classes, half of them TIFF, half NPY."""
    root = tmp_path_factory.mktemp("bands")
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for label in range(2):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 100, (14, 12, BANDS), dtype=np.uint8)
                pixels[..., 3 + label] += 150
                if number % 2:
                    np.save(folder / f"{number}.npy", pixels.transpose(2, 0, 1))
                else:
                    options = {"photometric": "minisblack", "planarconfig": "contig"}
                    tifffile.imwrite(folder / f"{number}.tif", pixels, **options)
    return root


@pytest.fixture(scope="module")
def trained(bands, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert train(bands, folder, *OPTIONS, "--save-every-steps", "2") == 0
    return folder


def test_a_run_that_goes_on_from_memory_in_mid_epoch_is_the_whole_one(bands, trained, tmp_path):
    with stopped_after(8):
        train(bands, tmp_path / "run", *OPTIONS, "--save-every-steps", "2")
    again = ("--cache", "ram", "--resume", "auto")
    assert train(bands, tmp_path / "run", *OPTIONS, "--save-every-steps", "2", *again) == 0
    assert_same_state(newest(trained), newest(tmp_path / "run"))


def test_sixteen_bits_by_the_batch_and_gone_on_with_one_by_one(bands, tmp_path):
    assert train(bands, tmp_path / "whole", *DEEP, "--save-every-steps", "2") == 0
    with stopped_after(8):
        train(bands, tmp_path / "run", *DEEP, "--save-every-steps", "2")
    again = ("--augment-on", "cpu", "--resume", "auto")
    assert train(bands, tmp_path / "run", *DEEP, "--save-every-steps", "2", *again) == 0
    assert_same_state(newest(tmp_path / "whole"), newest(tmp_path / "run"))


def test_the_tools_know_bands(bands, trained, tmp_path, capsys):
    classifier = load_for_inference(trained / "best.pth")
    path = bands / "val" / "class0" / "1.npy"
    pixels = classifier.transform(path)
    assert pixels.shape == (BANDS, 8, 8)
    assert predict.main([str(trained / "best.pth"), str(path), "--format", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)[0]["predictions"][0]["confidence"]
    with torch.no_grad():
        wanted = classifier.model(pixels[None]).softmax(1).max()
    assert answer == pytest.approx(float(wanted), abs=1e-5)
    assert report.main([str(trained / "best.pth"), "--output", str(tmp_path / "report")]) == 0
    assert json.loads((tmp_path / "report" / "report.json").read_text())["unreadable"] == []
    sent = decoded(path.read_bytes(), classifier.transform, 10**6)
    assert torch.equal(sent, pixels)
    with pytest.raises(RefusedError, match="damaged NPY") as caught:
        decoded(b"\x93NUMPY\1\0", classifier.transform, 10**6)
    assert caught.value.status == 422
    api = openapi("best.pth", 2, form=classifier.transform.form)
    assert "images of 5 channels, at 8 bits: TIFF, NPY or NPZ" in api["info"]["description"]


def test_explore_measures_each_band_and_writes_options(bands, tmp_path, capsys):
    argv = ["--data-path", str(bands), "--in-chans", "5", "--output-dir", str(tmp_path)]
    assert explore.main(argv) == 0
    shown = capsys.readouterr().out
    images = [tifffile.imread(p) for p in (bands / "train").rglob("*.tif")]
    images += [np.load(p).transpose(1, 2, 0) for p in (bands / "train").rglob("*.npy")]
    values = np.stack(images) / 255
    mean, std = values.mean((0, 1, 2)).round(4), values.std((0, 1, 2)).round(4)
    line = f"--in-chans 5 --mean {' '.join(map(str, mean))} --std {' '.join(map(str, std))}"
    assert line in shown
    config = (tmp_path / "normalisation.yaml").read_text()
    assert config.splitlines()[0] == "in_chans: 5"
    found = load(["--config", str(tmp_path / "normalisation.yaml")])
    assert found.data.mean == pytest.approx(tuple(mean))


def test_wrong_bands_name_the_file_and_the_option(bands, tmp_path, capsys):
    options = (*OPTIONS[2:], "--in-chans", "4")
    assert train(bands, tmp_path / "run", *options) != 0
    assert "5 bands" in (shown := capsys.readouterr().err) or "5×14×12" in shown
    assert "--in-chans" in shown


def test_packed_files_stay_as_they_are_and_the_next_command_reads_them(bands, tmp_path, capsys):
    folder = tmp_path / "packed"
    argv = ["--data-path", str(bands), "--in-chans", "5", "--output-dir", str(folder)]
    assert pack.main(argv) == 0
    shown = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(shown.partition("main.py ")[2])
    assert load(words).model.in_chans == BANDS
    with tarfile.open(next(folder.glob("val-*.tar"))) as shard:
        packed = {shard.extractfile(m).read() for m in shard if not m.name.endswith(".cls")}
    assert packed == {path.read_bytes() for path in (bands / "val").rglob("*.*")}
