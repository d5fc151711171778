"""What needs a CUDA card: whole runs, tools, and what the device does while the host goes on.

Skipped where there is no card. ``CUDA_TESTS_ON=cpu`` runs on the CPU what makes sense there: a
mistake in a test needn't wait for a card.
"""

import copy
import functools
import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import after_training
import holding
import numpy as np
import pytest
import torch
import torch.distributed as dist
from on_cuda import DEVICE, ON_CUDA, command, needs_device, no_waits, on_card, trained, weights
from runs import PATIENCE, ROOT, assert_equal, logged, newest, start_process

import main
import models
from architectures.memory_format import to_channels_last
from augmentation.batch import BatchAugment
from augmentation.preprocessing import Preprocessing
from checkpointing.folder import checkpoints_in
from config import AugmentOptions, OptimOptions
from distributed.wrapping import shard
from optimization.optimizer import build_optimizer, optimizer_supports_found_inf
from pipeline.dataset import Batch, ImageDataset
from pipeline.loader import Loader, LoaderSettings
from pipeline.prefetch import prefetch
from pipeline.sources.base import ArraySource
from samplers import ShuffleSampler
from tools import explain, export, predict, report

pytestmark = needs_device


# --- whole runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        ("--amp", "bf16"),
        ("--amp", "fp16", "--clip-grad", "1"),
        ("--amp", "off"),
        ("--opt", "sgd", "--lr", "0.05"),
        ("--opt", "lamb", "--accum-steps", "2"),
        ("--opt", "lion", "--lr", "1e-4"),
        ("--opt", "muon"),
        ("--on-nonfinite", "skip", "--clip-grad", "0.1", "--clip-mode", "agc"),
        ("--cosub", "--smoothing", "0"),
        ("--ThreeAugment", "--mixup-mode", "elem"),
        ("--augment-on", "cpu", "--num-workers", "2"),
        ("--cache", "none", "--num-workers", "2"),
        ("--cache", "device"),
        ("--model", "resnet18_cifar", "--input-size", "32"),
        ("--model", "resnet10t", "--input-size", "32", "--channels-last", "--amp", "fp16"),
        pytest.param(("--compile",), marks=on_card),
        pytest.param(("--compile", "--compile-mode", "reduce-overhead"), marks=on_card),
        ("--grad-checkpointing",),
        ("--batch-size", "auto", "--effective-batch", "256"),
        ("--model-ema-force-cpu",),
        ("--unfreeze-at", "1:*", "--freeze", "blocks.*"),
    ],
    ids=" ".join,
)
def test_run(tmp_path, more):
    assert trained(tmp_path, *more)["epoch"] == 2


@pytest.mark.parametrize("more", [(), ("--compile",)], ids=["eager", "compiled"])
@on_card
def test_cait_fused(tmp_path, more):
    cait = ("--model", "cait_XXS24_224", "--input-size", "32", "--talking-heads", "fused")
    trained(tmp_path, *cait, *more)


@on_card
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_trains_like_eager(tmp_path, mode):
    plain = ("--amp", "off", "--drop-path", "0", "--epochs", "1", "--warmup-epochs", "0")
    eager = trained(tmp_path / "eager", *plain)
    compiled = trained(tmp_path / "compiled", *plain, "--compile", "--compile-mode", mode)
    assert compiled["train_loss"] == pytest.approx(eager["train_loss"], rel=0.02)
    assert compiled["test_loss"] == pytest.approx(eager["test_loss"], rel=0.05)


def test_the_scale_of_fp16_comes_down_until_gradients_are_finite(tmp_path, monkeypatch):
    class Huge(torch.amp.GradScaler):
        def __init__(self, device):
            super().__init__(device, init_scale=2.0**40)

    monkeypatch.setattr(torch.amp, "GradScaler", Huge)
    trained(tmp_path, "--amp", "fp16")
    assert 1 <= newest(tmp_path)["scaler"]["scale"] < 2.0**36


def test_trained_on_one_device_evaluated_and_resumed_on_another(tmp_path, capsys):
    trained(tmp_path, "--amp", "off")
    scores = []
    for device in (DEVICE, "cpu"):
        line = ["--eval", "--resume", str(tmp_path / "best.pth"), "--device", device]
        capsys.readouterr()
        assert main.main([*line, "--amp", "off", "--num-workers", "0"]) == 0
        said = re.search(r"top-1 ([\d.]+) %.*loss ([\d.]+)", capsys.readouterr().out)
        scores.append([float(number) for number in said.groups()])
    assert scores[0][1] == pytest.approx(scores[1][1], rel=1e-2)
    assert scores[0][0] == pytest.approx(scores[1][0], abs=0.6)  # two of 359 images
    again = command(tmp_path, "--resume", "auto", "--epochs", "3", "--device", "cpu")
    assert main.main(again) == 0
    assert logged(tmp_path)[-1]["epoch"] == 3


def test_one_process_of_a_launcher(tmp_path):
    """NCCL on a card: the same weights as without a launcher, to rounding."""
    plain = ("--amp", "off", "--deterministic", "--epochs", "1", "--warmup-epochs", "0")
    trained(tmp_path / "alone", *plain)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    run = start_process(command(tmp_path / "launched", *plain), launcher)
    out, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, out
    alone, launched = weights(tmp_path / "alone"), weights(tmp_path / "launched")
    assert alone.keys() == launched.keys()
    for name, weight in alone.items():
        torch.testing.assert_close(launched[name], weight, rtol=1e-2, atol=1e-3, msg=name)


def test_one_rank_sharded_computes_the_same(tmp_path):
    """FSDP2, over NCCL on a card; a run of one process refuses --fsdp."""
    device, meet = torch.device(DEVICE, 0), f"file://{tmp_path}/meet"
    plain = models.build_model("deit_nano_patch4_32", 10, input_size=16).to(device)
    sharded = copy.deepcopy(plain)
    images = torch.randn(4, 3, 16, 16, device=device)
    expected = plain(images)
    expected.square().sum().backward()
    backend = "nccl" if ON_CUDA else "gloo"
    dist.init_process_group(backend, init_method=meet, rank=0, world_size=1)
    try:
        shard(sharded, device, None)
        answer = sharded(images)
        answer.square().sum().backward()
        gradient = sharded.head.weight.grad.full_tensor()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, plain.head.weight.grad, rtol=1e-4, atol=1e-5)


def start(folder: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    return start_process(command(folder, *more), **environment)


@pytest.mark.parametrize("more", [(), ("--amp", "fp16", "--opt", "sgd", "--lr", "0.05")])
def test_killed_and_resumed_is_bitwise_the_same(tmp_path, more):
    options = ("--deterministic", "--epochs", "4", "--save-every-steps", "5", *more)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    untouched = start(whole, *options)
    out, _ = untouched.communicate(timeout=PATIENCE)
    assert untouched.returncode == 0, out
    # In the second epoch of 22 updates: what was saved after 25 is on disk before 30 is saved.
    held = holding.variables(tmp_path, 31)
    run = start(parts, *options, *holding.OPTIONS, **held)
    holding.wait_for_hold(tmp_path, 0, lambda: run.poll() is not None, lambda: run.communicate()[0])
    assert checkpoints_in(parts)[0].stem.startswith("checkpoint-0001-")
    run.kill()
    run.communicate(timeout=30)
    assert run.returncode == -signal.SIGKILL
    (parts / "run.lock").unlink(missing_ok=True)
    again = start(parts, *options, "--resume", "auto")
    out, _ = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, out
    assert_equal(weights(whole), weights(parts), "model")


@on_card
def test_out_of_memory_says_what_helps(tmp_path, capsys, request):
    argv = command(tmp_path, "--model", "deit_base_patch16_224", "--input-size", "768")
    argv += ["--batch-size", "1024", "--amp", "off", "--no-model-ema", "--aa", "none"]
    torch.cuda.set_per_process_memory_fraction(0.1)  # others use the card meanwhile
    request.addfinalizer(functools.partial(torch.cuda.set_per_process_memory_fraction, 1.0))
    assert main.main(argv) != 0
    said = capsys.readouterr()
    assert "out of memory on cuda" in said.out + said.err
    assert "--batch-size 512 --accum-steps 2" in said.out + said.err


# --- the host goes on while the device works ------------------------------------------------------


OPTIMISERS = ("adamw", "sgd", "lamb", "lion", "muon", "adafactor", "nadamw", "lookahead_adamw")


@pytest.mark.parametrize(
    "more",
    [
        *(("--opt", opt) for opt in OPTIMISERS),
        *(("--opt", opt, "--amp", "fp16") for opt in ("adamw", "sgd", "lamb")),
        ("--clip-grad", "1"),
        ("--clip-grad", "0.1", "--clip-mode", "agc"),
        ("--clip-grad", "0.1", "--clip-mode", "value"),
        ("--on-nonfinite", "skip"),
        ("--accum-steps", "2", "--batch-size", "32"),
        ("--cosub", "--smoothing", "0"),
        ("--bce-loss", "--smoothing", "0"),
        ("--ThreeAugment", "--mixup-mode", "pair"),
        ("--cache", "none", "--num-workers", "2"),
        ("--cache", "device"),
        ("--model", "deit_tiny_distilled_patch16_224", "--input-size", "32"),
        ("--model", "resnet18_cifar", "--input-size", "32"),
    ],
    ids=" ".join,
)
def test_the_host_does_not_wait_between_log_lines(tmp_path, more):
    """From the 4th to the 20th of 22 updates, through loader, copies, augmentation, mixing, loss,
    clipping, optimiser and moving average."""
    with no_waits(4, 20) as modes:
        trained(tmp_path, "--epochs", "1", "--warmup-epochs", "0", "--log-interval", "1000", *more)
    assert modes == ["error", "default", "default"]


def bytes_of_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def loader(workers: int, *, pin: bool) -> Loader:
    """Batches of 16 of 160 images."""
    preprocessing = Preprocessing(32, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)
    augment = BatchAugment(preprocessing, AugmentOptions(), 0)
    source = ArraySource(bytes_of_images(160), np.arange(160) % 10, list("abcdefghij"), "noise")
    return Loader(
        ImageDataset(source, augment, is_train=True),
        ShuffleSampler(160),
        LoaderSettings(batch_size=16, num_workers=workers, pin_memory=pin),
    )


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(DEVICE, non_blocking=True)


def test_batches_of_workers_are_pinned_and_arrive_whole():
    """Each is used while the next one is on its way."""
    expected = [(b.images.clone(), b.targets.clone()) for b in loader(0, pin=False)]
    pinned = []

    def noted() -> Iterator[Batch]:
        for batch in loader(2, pin=True):
            pinned.append(batch.images.is_pinned())
            yield batch

    sums = []
    for batch in prefetch(noted(), torch.device(DEVICE), on_device):
        if ON_CUDA:
            torch.cuda._sleep(20_000_000)  # the device is some 10 ms behind
        sums.append((batch.images.clone(), batch.targets.clone()))
        del batch
    assert pinned == [ON_CUDA] * 10
    for (images, targets), (right_images, right_targets) in zip(sums, expected, strict=True):
        assert torch.equal(images.cpu(), right_images)
        assert torch.equal(targets.cpu(), right_targets)


@on_card
def test_the_next_batch_is_copied_while_the_device_is_busy(monkeypatch):
    """The host gets a batch, and the next one is copied, before work queued earlier is done."""
    device, streams = torch.device("cuda"), []
    usual = torch.cuda.Stream

    def noted(*arguments, **options):  # torch.cuda.current_stream makes some too
        return streams.append(usual(*arguments, **options)) or streams[-1]

    monkeypatch.setattr(torch.cuda, "Stream", noted)
    images = [torch.full((64, 3, 128, 128), float(i)).pin_memory() for i in range(4)]
    places = torch.arange(64)
    coming = prefetch((Batch(x, places, places, places, []) for x in images), device, on_device)
    next(coming)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    busy = torch.cuda.Event()
    busy.record()
    second = next(coming)  # the third is on its way
    streams[0].synchronize()
    assert not busy.query()
    assert float(second.images.mean()) == 1.0
    assert [float(batch.images.mean()) for batch in coming] == [2.0, 3.0]


@pytest.mark.parametrize("opt", ["adamw", "adam", "sgd"])
def test_fused_kernels_leave_an_update_out(opt):
    """``found_inf`` on the device: weights and state stay, bit by bit."""
    model = torch.nn.Linear(33, 7).to(DEVICE)
    optimizer = build_optimizer(model, OptimOptions(opt=opt, weight_decay=0.1), lr=0.1)
    assert optimizer_supports_found_inf(optimizer)

    def step(gradient: float, found: float) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.found_inf = torch.full((), found, device=DEVICE)
        optimizer.step()

    def state() -> list[torch.Tensor]:
        kept = [v for values in optimizer.state.values() for v in values.values()]
        return [t.clone() for t in (*model.parameters(), *kept) if torch.is_tensor(t)]

    start = state()
    step(0.5, 0.0)
    before = state()
    assert not torch.equal(start[0], before[0])
    step(float("nan"), 1.0)
    assert_equal(state(), before, opt)
    step(0.5, 0.0)
    assert not torch.equal(state()[0], before[0])


def test_augmentation_is_that_of_the_cpu():
    """To one level of 255, but for few pixels where the last digit decides between two."""
    preprocessing = Preprocessing(32, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)
    images = torch.from_numpy(bytes_of_images(128)).permute(0, 3, 1, 2).contiguous()
    for options in (AugmentOptions(), AugmentOptions(ThreeAugment=True)):
        augment = BatchAugment(preprocessing, options, 0)
        plan = augment.plan(0, np.arange(128))
        by_pixel = images.contiguous(memory_format=torch.channels_last)  # as workers give them
        there = augment(by_pixel.to(DEVICE), plan).cpu()
        here = BatchAugment(preprocessing, options, 0)(images, plan)
        assert ((there - here).abs() > 1.5 / 255 / 0.5).float().mean() < 1e-3


@pytest.mark.parametrize("name", ["resnet10t", "resnet18_cifar"])
def test_channels_last_is_another_layout_and_no_other_result(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = models.build_model(name, 10, input_size=32).to(DEVICE)
    images = torch.randn(8, 3, 32, 32, device=DEVICE)
    expected = model(images)
    expected.square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    to_channels_last(model)
    kernels = [p for p in model.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    outputs = model(images.contiguous(memory_format=torch.channels_last))
    outputs.square().mean().backward()
    torch.testing.assert_close(outputs, expected, rtol=1e-3, atol=1e-4)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-2, atol=1e-4)


@pytest.fixture(scope="module")
def checkpoint(images, tmp_path_factory) -> Path:
    return after_training.train(images, tmp_path_factory.mktemp("run"), "--device", DEVICE)


def answers(capsys, *argv: object) -> list[dict]:
    assert predict.main([*map(str, argv), "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_predictions_are_those_of_the_cpu(checkpoint, images, capsys):
    there, here = (
        answers(capsys, checkpoint, images / "val", "--device", device)
        for device in (DEVICE, "cpu")
    )
    assert len(there) == len(here) > 0
    for left, right in zip(there, here, strict=True):
        assert left["file"] == right["file"]
        given, wanted = (
            {p["class"]: p["confidence"] for p in side["predictions"]} for side in (left, right)
        )
        assert given == pytest.approx(wanted, abs=1e-2)


def test_explanations_report_and_export(checkpoint, images, tmp_path):
    image = sorted((images / "val").rglob("*.png"))[0]
    where = ["--device", DEVICE]
    assert explain.main([str(checkpoint), str(image), "--output", str(tmp_path / "e"), *where]) == 0
    assert len(list((tmp_path / "e").glob("*.png"))) == 1
    assert report.main([str(checkpoint), "--output", str(tmp_path / "r"), *where]) == 0
    assert json.loads((tmp_path / "r" / "report.json").read_text())["images"] == 8
    pytest.importorskip("onnx")
    exported = ["--format", "onnx", "torchscript", "--output", str(tmp_path / "x"), *where]
    assert export.main([str(checkpoint), *exported, "--num-workers", "0"]) == 0


def test_the_service_answers(checkpoint, images):
    pytest.importorskip("uvicorn")
    image = sorted((images / "val").rglob("*.png"))[0]
    line = [sys.executable, "-m", "tools.serve", str(checkpoint), "--device", DEVICE, "--port", "0"]
    service = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        url = service.stdout.readline().strip()
        question = urllib.request.Request(
            f"{url.rstrip('/')}/predict", image.read_bytes(), {"Content-Type": "image/png"}
        )
        with urllib.request.urlopen(question, timeout=60) as answer:
            assert json.load(answer)
    finally:
        service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0
