"""What a run says of its pictures' way to the model, and what it does about a slow one."""

import io
import re
import shlex
import types

import numpy as np
import pytest
import torch
from after_training import make_pictures
from PIL import Image

import build
import datasets
import main
import models
import utils
from config import load
from datasets import BadPictureError, decode, decode_tensor, most_workers
from tools.benchmark import ROOT
from tools.data import __main__ as packing

TINY = ("--data-set", "DIGITS", "--model", "deit_nano_patch4_32", "--input-size", "8")
TINY += ("--device", "cpu", "--epochs", "1", "--warmup-epochs", "0", "--no-tensorboard")
TINY += ("--batch-size", "64", "--no-repeated-aug", "--no-model-ema")

SLOW = """
import time
import numpy as np
from datasets import Source, register_dataset

class Slow(Source):
    classes = ["a", "b"]
    targets = np.arange(24) % 2

    def open(self, index):
        time.sleep(0.05)
        return np.full((8, 8), 10 * (index % 2), dtype=np.uint8)

    def sample_id(self, index):
        return str(index)

@register_dataset("slow")
def slow(is_train, options, seed):
    return Slow()
"""


def run(folder, *options):
    assert main.main([*TINY, "--output-dir", str(folder), *options]) == 0


# --- what is said -------------------------------------------------------------------------------


def test_log_lines_say_what_bounds_the_run(tmp_path, capsys):
    run(tmp_path, "--log-interval", "5", "--num-workers", "0")
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("epoch 1 [")]
    assert re.search(r"first step \d+\.\d s  \d+\.\d GiB$", lines[0])
    for line in lines[1:]:
        assert re.search(r"[\d.]+ img/s  data wait \d+%  step \d+ ms  \d+\.\d GiB$", line)


def test_pictures_way_is_introduced(tmp_path, capsys):
    run(tmp_path / "a")
    assert re.search(
        r"^input    0\.4 MiB of pictures in memory of cpu; augmented by the batch on cpu$",
        capsys.readouterr().out,
        re.M,
    )
    run(tmp_path / "b", "--cache", "none", "--augment-on", "cpu", "--num-workers", "1")
    out = capsys.readouterr().out
    assert "input    1 loader processes; augmented one by one on the host" in out
    run(tmp_path / "c", "--cache", "ram", "--augment-on", "cpu", "--num-workers", "0")
    assert (
        "0 loader processes, 0.3 MiB of pictures in ram; augmented one" in capsys.readouterr().out
    )


def test_a_run_that_waits_for_pictures_is_told_what_to_change(tmp_path, capsys, monkeypatch):
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.setattr(datasets, "cores", lambda: 4)
    options = ["--plugin", str(tmp_path / "slow.py"), "--data-set", "slow", "--batch-size", "4"]
    options += ["--log-interval", "1", "--num-workers", "0"]
    run(tmp_path / "run", *options)
    shown = capsys.readouterr()
    (told,) = [x for x in (shown.out + shown.err).splitlines() if "waiting for pictures" in x]
    assert re.search(r"\d\d % of the time", told)
    assert "--num-workers 4 (now 0, the machine has 4 cores)" in told
    assert "--cache ram" in told and "tools.data pack" in told and "--augment-on" not in told
    run(tmp_path / "other", *options, "--augment-on", "cpu")
    shown = capsys.readouterr()
    assert "; --augment-on device;" in shown.out + shown.err


def test_a_fast_run_is_told_nothing(tmp_path, capsys):
    run(tmp_path)
    shown = capsys.readouterr()
    assert "waiting for pictures" not in shown.out + shown.err


# --- shared memory ------------------------------------------------------------------------------


@pytest.fixture
def shared_memory(monkeypatch):
    """shared_memory(bytes): what /dev/shm has free."""

    def free(count):
        usage = types.SimpleNamespace(free=count)
        monkeypatch.setattr(datasets.shutil, "disk_usage", lambda path: usage)

    return free


def test_workers_are_counted_by_what_their_batches_need(shared_memory):
    # A container's 64 MiB: batches of 256 pictures of 224×224 bytes are 36.8 MiB.
    shared_memory(64 << 20)
    assert most_workers(256 * 224 * 224 * 3, 1) == 0
    # 2.5 of them are a place: training's, evaluation's of 1.5 times the size.
    shared_memory(21 * 2_500)
    assert most_workers(1_000, 1) == 10
    assert most_workers(1_000, 2) == 4
    shared_memory(1 << 40)
    assert most_workers(1_000, 8) > 1000


def test_where_nobody_knows_the_shared_memory_nothing_is_limited():
    assert most_workers(1_000, 1, shm="/nowhere/at/all") is None


def test_too_many_workers_for_the_shared_memory(shared_memory, tmp_path, capsys):
    shared_memory(1 << 20)
    options = [*TINY, "--output-dir", str(tmp_path), "--input-size", "32"]
    assert main.main([*options, "--num-workers", "3"]) == 2
    error = capsys.readouterr().err
    # 64 pictures of 3072 bytes, 2.5 of such a batch a place: 2 places, of which one is spare.
    assert (
        "--num-workers: /dev/shm has room for the batches of 0 loader processes, not of 3" in error
    )
    assert "--shm-size" in error
    assert main.main([*options, "--num-workers", "auto", "--cache", "none"]) == 0
    shown = capsys.readouterr()
    assert "0 loader processes instead of" in shown.out + shown.err


# --- the engine's settings ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, expected",
    [
        ("resnet18", True),
        ("convnext_atto", True),
        ("deit_nano_patch4_32", False),
        ("cait_xxs24_224", False),
    ],
)
def test_convolutional_networks_go_channels_last(name, expected):
    model = models.build_model(name, 3, input_size=224 if "224" in name else 32)
    assert models.wants_channels_last(model, None) is expected
    assert models.wants_channels_last(model, not expected) is not expected


@pytest.mark.parametrize("options, expected", [((), True), (("--no-channels-last",), False)])
def test_memory_layout_of_a_run(options, expected, monkeypatch):
    config = load([*TINY, "--model", "resnet18", "--input-size", "32", *options])
    model, _ = build.build_model(config, 10, torch.device("cpu"))
    weight = model.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) is expected
    data = types.SimpleNamespace(prepare=None)
    device = torch.device("cpu")
    step = build.step_options(config, utils.Processes(), device, data, model)
    placed = step.place(torch.rand(2, 3, 8, 8))
    assert placed.is_contiguous(memory_format=torch.channels_last) is expected
    assert step.place(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).is_contiguous()


def test_peaks_are_known_by_name(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("Some other card", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert utils.device_peak(cuda, torch.bfloat16) == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert utils.device_peak(cuda, torch.bfloat16) is None
    assert utils.device_peak(cuda, torch.float16) == 65e12
    assert utils.device_peak(cuda, None) is None
    assert utils.device_peak(torch.device("cpu"), torch.bfloat16) is None


# --- decoding -----------------------------------------------------------------------------------


def encoded(mode="RGB", kind="JPEG", **options):
    pixels = np.random.RandomState(0).randint(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((60, 50), Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(exif=exif)


@pytest.mark.parametrize(
    "content",
    [
        encoded(quality=95),
        encoded(quality=40, subsampling=2),
        encoded(quality=90, progressive=True),
        encoded("L"),
        encoded("CMYK"),
        rotated(),
        encoded(kind="PNG"),
        encoded("P", kind="PNG"),
        encoded(kind="WEBP", lossless=True),
    ],
    ids=["plain", "small", "progressive", "grey", "cmyk", "rotated", "png", "palette", "webp"],
)
def test_tensors_hold_the_pixels_that_pillow_reads(content, tmp_path):
    expected = np.asarray(decode(io.BytesIO(content)))
    (tmp_path / "picture").write_bytes(content)
    for picture in (io.BytesIO(content), str(tmp_path / "picture"), tmp_path / "picture"):
        tensor = decode_tensor(picture)
        assert tensor.dtype == torch.uint8
        # Two builds of libjpeg-turbo may round differently.
        difference = tensor.permute(1, 2, 0).numpy().astype(int) - expected.astype(int)
        assert np.abs(difference).max() <= 2


def test_damaged_pictures_have_the_same_reasons(tmp_path):
    whole = encoded()
    for content in (whole[: len(whole) // 2], whole[:30], b"\xff\xd8\xffnothing", b"", b"text"):
        with pytest.raises(BadPictureError) as expected:
            decode(io.BytesIO(content))
        with pytest.raises(BadPictureError) as found:
            decode_tensor(io.BytesIO(content))
        assert str(found.value) == str(expected.value)
    with pytest.raises(BadPictureError, match="No such file"):
        decode_tensor(tmp_path / "missing.jpg")


def test_arrays_are_decoded_without_a_copy_in_between():
    array = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert torch.equal(decode_tensor(array).permute(1, 2, 0), torch.from_numpy(array))
    assert decode_tensor(array[..., 0]).shape == (3, 4, 4)


# --- pages and options --------------------------------------------------------------------------


def test_commands_of_the_page(tmp_path, monkeypatch):
    make_pictures(tmp_path / "pets")
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for block in re.findall(r"```sh\n(.*?)```", text, re.S)
                for line in block.strip().splitlines()]  # fmt: skip
    assert len(commands) == 2
    monkeypatch.chdir(tmp_path)
    assert packing.main(commands[0][3:]) == 0
    assert commands[0][:3] == ["python", "-m", "tools.data"]
    tiny = [*TINY[2:], "--batch-size", "4", "--output-dir", "run", "--num-workers", "0"]
    assert commands[1][:2] == ["python", "main.py"]
    assert main.main([*commands[1][2:], *tiny]) == 0


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile_mode_reaches_the_compiler(mode, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda module, **how: asked.append(how) or module)
    module = torch.nn.Identity()
    assert build.compiled(load([*TINY, "--compile", "--compile-mode", mode]), module) is module
    assert asked == [{"mode": mode}]
    build.compiled(load([*TINY]), module)
    assert len(asked) == 1
