"""Compare speed with timm and a plain loop, in turns in one run: ``python -m tools.benchmark``.

    python -m tools.benchmark loader     photographs: workers' share, and all of it on the host
    python -m tools.benchmark cache      small pictures from memory
    python -m tools.benchmark step       a training step
    python -m tools.benchmark epoch      a whole epoch, pictures included
    python -m tools.benchmark scaling    more processes
    python -m tools.benchmark report     write BENCHMARKS.md from the figures

Each contender runs once to warm up; then they take turns, and the medians are compared, so that a
busy machine slows all alike. The figures go to benchmarks/NAME-DEVICE.json.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_loader, create_transform
from torch import nn

import cache
import engine
import models
import utils
from augment import Preprocessing, build_mixer
from batch_augment import BatchAugment
from build import build_data, build_state, step_options
from config import AugmentOptions, Config, load
from datasets import (
    ArraySource,
    Batch,
    FileSource,
    ImageDataset,
    build_loader,
    cores,
    decode_tensor,
)
from losses import CrossEntropy
from samplers import ShuffleSampler
from tools import command

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEIT = {
    "auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3, "interpolation": "bicubic",
    "re_prob": 0.25, "re_mode": "pixel", "re_count": 1,
}  # fmt: skip
CUDA_BATCHES = {
    "deit_small_patch16_224": 256,
    "deit_base_patch16_224": 128,
    "deit_tiny_patch16_224": 256,
    "resnet50": 256,
}
CPU_BATCHES = {"deit_tiny_patch16_224": 8, "resnet50": 8}
PLAIN = {"auto_augment": None, "color_jitter": None, "re_prob": 0.25, "re_mode": "pixel"}
Rows = Iterator[dict[str, Any]]
Contender = Callable[[], int]  # returns the pictures it has dealt with


# --- measuring ----------------------------------------------------------------------------------


def compare(title: str, ours: Contender, theirs: Contender, repeats: int, **more: Any) -> dict:
    """Pictures a second of both, medians over ``repeats`` turns, and their ratio."""
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in command.progress(range(-1, repeats), title):
        for name, contender in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            pictures = contender()
            if turn >= 0:
                rates[name].append(pictures / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = [a / b for a, b in zip(rates["ours"], rates["theirs"], strict=True)]
    row = {
        "title": title,
        **medians,
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "repeats": repeats,
        **more,
    }
    print(f"{title}: {medians['ours']:.0f} against {medians['theirs']:.0f} pictures/s, "
          f"{row['ratio']:.2f}× ({row['least']:.2f} to {row['most']:.2f})", flush=True)  # fmt: skip
    return row


def surroundings(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    cuda = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if cuda else processor()
    versions = {m.__name__: str(m.__version__) for m in (torch, torchvision, timm, np)}
    return {
        "hardware": hardware,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "pillow": Image.__version__,
        **versions,
    }


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# --- pictures -----------------------------------------------------------------------------------


def photographs(folder: Path, given: str) -> list[Path]:
    """JPEG files: those of the folder ``given``, or crops of scikit-learn's two photographs.

    The crops are 500×375 pixels at qualities 90 to 96, as ImageNet's are on average.
    """
    if given:
        found = sorted(p for p in Path(given).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        if not found:
            raise command.UserError(f"--pictures: {given} has no JPEG files")
        return found[:200]
    from sklearn.datasets import load_sample_images

    rng = np.random.RandomState(0)
    paths = []
    for number, image in enumerate(
        itertools.islice(itertools.cycle(load_sample_images().images), 40)
    ):
        picture = Image.fromarray(image)
        left, top = rng.randint(0, 100), rng.randint(0, 40)
        part = picture.crop((left, top, left + 540, top + 387)).resize((500, 375))
        paths.append(folder / f"{number}.jpg")
        part.save(paths[-1], quality=90 + number % 7)
    return paths


def small_pictures(count: int = 2048) -> tuple[np.ndarray, np.ndarray]:
    """(N, 32, 32, 3) uint8 and labels: patches of the photographs."""
    from sklearn.datasets import load_sample_images

    rng = np.random.RandomState(0)
    sources = load_sample_images().images
    images = []
    for number in range(count):
        image = sources[number % 2]
        top, left = rng.randint(0, image.shape[0] - 64), rng.randint(0, image.shape[1] - 64)
        images.append(image[top : top + 64 : 2, left : left + 64 : 2])
    return np.stack(images), rng.randint(0, 10, count)


def _options(name: str) -> AugmentOptions:
    if name == "DeiT":
        return AugmentOptions()
    return AugmentOptions(aa=None, color_jitter=None)


# --- benchmarks ---------------------------------------------------------------------------------


def loader(arguments: argparse.Namespace, device: torch.device) -> Rows:
    """Photographs with the DeiT recipe: what a worker does, and all of it on one core."""
    torch.set_num_threads(1)
    preprocessing = Preprocessing(224, 0.875, "bicubic", MEAN, STD)
    with tempfile.TemporaryDirectory() as temporary:
        paths = photographs(Path(temporary), arguments.pictures)
        transform = create_transform(224, is_training=True, mean=MEAN, std=STD, **DEIT)
        augment = BatchAugment(preprocessing, AugmentOptions(), 0)

        def theirs() -> int:
            for path in paths:
                transform(Image.open(path).convert("RGB"))
            return len(paths)

        def share() -> int:
            for number, path in enumerate(paths):
                augment.crop(decode_tensor(str(path)), 0, number)
            augment.plan(0, np.arange(len(paths)))
            return len(paths)

        def everything() -> int:
            crops = [augment.crop(decode_tensor(str(p)), 0, i) for i, p in enumerate(paths)]
            augment(torch.stack(crops), augment.plan(0, np.arange(len(paths))))
            return len(paths)

        repeats = arguments.repeats
        yield compare("a worker's share, against timm's whole chain", share, theirs, repeats)
        yield compare("all of it on one core, against timm's chain", everything, theirs, repeats)
        yield _whole_loaders(paths, augment, arguments)


def _whole_loaders(
    paths: Sequence[Path], augment: BatchAugment, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Both loaders with two processes, batches of 32, up to the model's input."""
    many = [str(p) for p in paths] * max(1, 320 // len(paths))
    source = FileSource(Path("/"), many, [0] * len(many), ["one"])
    ours = build_loader(
        ImageDataset(source, augment, is_train=True), ShuffleSampler(len(many)),
        batch_size=32, num_workers=2, pin_memory=False, drop_last=True, seed=0,
    )  # fmt: skip

    class Pictures(torch.utils.data.Dataset):
        transform: Any = None

        def __len__(self) -> int:
            return len(many)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return self.transform(Image.open(many[index]).convert("RGB")), 0

    theirs = create_loader(
        Pictures(), (3, 224, 224), 32, is_training=True, mean=MEAN, std=STD, num_workers=2,
        use_prefetcher=False, persistent_workers=True, **DEIT,
    )  # fmt: skip

    def run_ours() -> int:
        return sum(len(augment(batch.images, batch.plan)) for batch in ours)

    def run_theirs() -> int:
        return sum(len(images) for images, _ in theirs)

    title = "loaders with two processes, up to the model's input"
    return compare(title, run_ours, run_theirs, max(3, arguments.repeats // 2))


def small(arguments: argparse.Namespace, device: torch.device) -> Rows:
    """32×32 pictures from memory, one core, against timm's loader in the same process."""
    torch.set_num_threads(1)
    images, labels = small_pictures()
    preprocessing = Preprocessing(32, 1.0, "bicubic", MEAN, STD)
    for name, recipe, title in (
        ("plain", PLAIN, "crop, flip, normalise, erase"),
        ("DeiT", DEIT, "the same with RandAugment"),
    ):
        augment = BatchAugment(preprocessing, _options(name), 0)
        source = ArraySource(images, labels, [str(i) for i in range(10)], "patches")
        plain = build_loader(
            ImageDataset(source, augment, is_train=True), ShuffleSampler(len(images)),
            batch_size=128, num_workers=0, pin_memory=False, drop_last=True, seed=0,
        )  # fmt: skip
        where = "device" if device.type == "cuda" else "ram"
        ours = cache.apply(where, plain, device=device)

        class Pictures(torch.utils.data.Dataset):
            transform: Any = None

            def __len__(self) -> int:
                return len(images)

            def __getitem__(self, index: int) -> tuple[Any, int]:
                return self.transform(Image.fromarray(images[index])), int(labels[index])

        theirs = create_loader(
            Pictures(), (3, 32, 32), 128, is_training=True, mean=MEAN, std=STD, num_workers=0,
            use_prefetcher=False, persistent_workers=False, **recipe,
        )  # fmt: skip

        def run_ours(ours: Any = ours, augment: BatchAugment = augment) -> int:
            count = sum(len(augment(batch.images, batch.plan)) for batch in ours)
            _wait(device)
            return count

        def run_theirs(theirs: Any = theirs) -> int:
            return sum(len(batch) for batch, _ in theirs)

        yield compare(title, run_ours, run_theirs, arguments.repeats)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Training:
    """The engine's training of a model, step by step, and a plain loop's of timm's model."""

    def __init__(
        self, model: str, size: int, batch: int, device: torch.device, compiled: bool
    ) -> None:
        amp = "bf16" if device.type == "cuda" else "off"
        argv = ["--model", model, "--data-set", "DIGITS", "--input-size", str(size),
                "--batch-size", str(batch), "--amp", amp, "--no-model-ema", "--device",
                str(device), "--num-workers", "0", "--no-repeated-aug", "--log-interval", "1000",
                "--epochs", "1", "--warmup-epochs", "0", "--drop-path", "0"]  # fmt: skip
        self.config = load([*argv, *(["--compile"] if compiled else [])])
        self.device, self.batch, self.size = device, batch, size
        processes = utils.Processes()
        preprocessing = Preprocessing(size, 0.875, "bicubic", MEAN, STD)
        data = build_data(self.config, processes)
        data.set_transforms(self.config, preprocessing, device)
        self.ours = models.build_model(model, 1000, input_size=size).to(device)
        self.state, _ = build_state(self.config, self.ours, data, processes, device)
        self.options = step_options(self.config, processes, device, data, self.ours)
        self.images = torch.randn(batch, 3, size, size)
        self.targets = torch.randint(0, 1000, (batch,))
        if device.type == "cuda":
            self.images, self.targets = self.images.pin_memory(), self.targets.pin_memory()

    def run_ours(self, steps: int) -> int:
        positions = torch.arange(self.batch)
        batch = Batch(self.images, self.targets, positions, positions, [])
        self.state.progress.step = 0
        engine.train_one_epoch(
            self.state, CrossEntropy(0.1), itertools.repeat(batch, steps), self.options,
            steps=steps + 1,
        )  # fmt: skip
        _wait(self.device)
        return steps * self.batch

    def plain_loop(self, model: nn.Module, amp: torch.dtype | None, read: bool) -> Contender:
        """A loop as people write it; ``read``: it looks at each step's loss."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        scaler = torch.amp.GradScaler(self.device.type, enabled=amp == torch.float16)

        def run(steps: int) -> int:
            for _ in range(steps):
                images = self.images.to(self.device, non_blocking=True)
                targets = self.targets.to(self.device, non_blocking=True)
                with torch.autocast(self.device.type, amp, enabled=amp is not None):
                    loss = criterion(model(images), targets)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                if read:
                    loss.item()
            _wait(self.device)
            return steps * self.batch

        return run


def step(arguments: argparse.Namespace, device: torch.device) -> Rows:
    """A training step of DeiT and ResNet: the engine's, and a plain loop over timm's model."""
    cuda = device.type == "cuda"
    batches = CUDA_BATCHES if cuda else CPU_BATCHES
    names = arguments.models or list(batches)
    matmul = matmul_rate(device) if cuda else None
    steps = 20 if cuda else 2
    for name in names:
        batch = batches.get(name, 128 if cuda else 8)
        training = _Training(name, 224, batch, device, compiled=cuda)
        amp = torch.bfloat16 if cuda else None
        other = timm.create_model(name, num_classes=1000).to(device)
        loop = training.plain_loop(torch.compile(other) if cuda else other, amp, read=False)
        row = compare(
            f"{name}, batch {batch}, {'compiled bf16' if cuda else 'float32'}, against timm's "
            "model in the same kind of loop",
            lambda training=training: training.run_ours(steps),
            lambda loop=loop: loop(steps),
            arguments.repeats,
        )
        if matmul:
            macs = models.summarise(training.ours, 224).macs
            row["matmul_flops"] = matmul
            row["share_of_matmul_rate"] = 6 * macs * row["ours"] / matmul
            print(f"   {row['share_of_matmul_rate']:.0%} of the measured {matmul / 1e12:.0f} "
                  "TFLOP/s of a matrix product")  # fmt: skip
        yield row
        if cuda:
            del loop, other
            torch.cuda.empty_cache()
            eager = training.plain_loop(
                timm.create_model(name, num_classes=1000).to(device), torch.float16, read=True
            )
            yield compare(
                f"{name}, batch {batch}, against an eager fp16 loop that reads each loss",
                lambda training=training: training.run_ours(steps),
                lambda eager=eager: eager(steps),
                arguments.repeats,
            )
            del eager
        del training
        if cuda:
            torch.cuda.empty_cache()


def matmul_rate(device: torch.device, size: int = 8192) -> float:
    """Floating-point operations a second of a large bf16 matrix product, measured."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    _wait(device)
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    _wait(device)
    return 20 * 2 * size**3 / (time.perf_counter() - start)


def epoch(arguments: argparse.Namespace, device: torch.device) -> Rows:
    """An epoch over the bundled digits: ``configs/quickstart.yaml`` against timm's parts."""
    config: Config = load(["--config", str(ROOT / "configs/quickstart.yaml")])
    processes = utils.Processes()
    preprocessing = Preprocessing(config.model.input_size, 1.0, "bicubic", MEAN, STD)
    data = build_data(config, processes)
    data.set_transforms(config, preprocessing, device)
    model = models.build_model(
        config.model.model, 10, input_size=config.model.input_size,
        drop_path=config.model.drop_path,
    ).to(device)  # fmt: skip
    state, _ = build_state(config, model, data, processes, device)
    options = step_options(config, processes, device, data, model)
    mixer = build_mixer(config.augment, 10)

    def ours() -> int:
        state.progress.step = 0
        engine.train_one_epoch(
            state, CrossEntropy(config.loss.smoothing), data.batches(0), options,
            steps=data.steps + 1, mixer=mixer,
        )  # fmt: skip
        _wait(device)
        return data.steps * config.data.batch_size

    yield compare("an epoch of the quickstart, against timm's parts in a plain loop", ours,
                  _timm_epoch(config, data, device), arguments.repeats)  # fmt: skip


def _timm_epoch(config: Config, data: Any, device: torch.device) -> Contender:
    """The same model, pictures and recipe through timm's loader, mixup and EMA."""
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.utils import ModelEmaV3

    augment, size = config.augment, config.model.input_size
    source = data.train.source

    class Digits(torch.utils.data.Dataset):
        transform: Any = None

        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            image, label = source.read(index)
            return self.transform(Image.fromarray(np.asarray(image)).convert("RGB")), label

    batches = create_loader(
        Digits(), (3, size, size), config.data.batch_size, is_training=True, mean=MEAN, std=STD,
        num_workers=0, use_prefetcher=False, persistent_workers=False, auto_augment=augment.aa,
        color_jitter=None, re_prob=augment.reprob, re_mode=augment.remode, hflip=augment.hflip,
    )  # fmt: skip
    mixup = None
    if augment.mixup > 0 or augment.cutmix > 0:
        mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=config.loss.smoothing,
                      num_classes=10)  # fmt: skip
    criterion = SoftTargetCrossEntropy() if mixup else nn.CrossEntropyLoss(label_smoothing=0.1)
    model = models.build_model(
        config.model.model, 10, input_size=size, drop_path=config.model.drop_path
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    average = ModelEmaV3(model, 0.999) if config.ema.model_ema else None

    def run() -> int:
        count = 0
        model.train()
        for images, targets in batches:
            images, targets = images.to(device), targets.to(device)
            if mixup:
                images, targets = mixup(images, targets)
            loss = criterion(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if average:
                average.update(model)
            count += len(images)
        _wait(device)
        return count

    return run


def scaling(arguments: argparse.Namespace, device: torch.device) -> Rows:
    """Pictures a second of 1, 2, … training processes, each with its own batch."""
    most = torch.cuda.device_count() if device.type == "cuda" else cores()
    worlds = [w for w in (1, 2, 4, 8) if w <= most]
    model = "deit_small_patch16_224" if device.type == "cuda" else "deit_nano_patch4_32"
    rates: dict[int, list[float]] = {world: [] for world in worlds}
    for _ in range(max(1, arguments.repeats // 3)):
        for world in worlds:
            rates[world].append(_rate_of(world, model, device))
    alone = statistics.median(rates[1])
    for world in worlds[1:]:
        rate = statistics.median(rates[world])
        ratio = rate / (alone * world)
        print(f"{world} processes: {rate:.0f} pictures/s, {ratio:.0%} of {world} × one")
        yield {"title": f"{world} processes, {model}, against one process × {world}",
               "ours": rate, "theirs": alone * world, "ratio": ratio,
               "repeats": len(rates[world])}  # fmt: skip


def _rate_of(world: int, model: str, device: torch.device) -> float:
    """Pictures a second that a run of ``world`` processes reports at its end."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable]
        if world > 1:
            launcher += [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(world),
            ]
        run = subprocess.run(
            [*launcher, "main.py", "--data-set", "DIGITS", "--model", model, "--device",
             device.type, "--input-size", "32" if device.type == "cpu" else "224",
             "--batch-size", "32" if device.type == "cpu" else "256", "--epochs", "2",
             "--warmup-epochs", "0", "--output-dir", folder, "--no-tensorboard",
             "--no-model-ema"],
            cwd=ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if run.returncode:
            raise command.UserError(f"a run of {world} processes failed: {run.stderr[-500:]}")
        lines = [x for x in run.stdout.splitlines() if "img/s" in x]
        return float(lines[-1].split(" img/s")[0].split()[-1])


# --- the page -----------------------------------------------------------------------------------

BENCHMARKS = {
    "loader": (loader, "Photographs, DeiT recipe, 224×224", "timm's `create_transform`"),
    "cache": (small, "Small pictures, 32×32, one core", "timm's `create_loader`"),
    "step": (step, "A training step", "a plain loop"),
    "epoch": (epoch, "An epoch of the quickstart", "timm's parts in a plain loop"),
    "scaling": (scaling, "Several processes", "one process × N"),
}
HEAD = """# Benchmarks

Written by `python -m tools.benchmark report` from the figures in [benchmarks](benchmarks). Both
sides run in one process, in turns; rates are medians in pictures a second, the ratio is the median
of the turns' ratios, with the least and the greatest. A ratio below 1 is a loss, and stays in the
table.
"""
UNMEASURED = """
## Not measured

{names}. `.ci/gpu` runs the others and the CUDA tests on a machine with a card.
"""


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def report(folder: Path = FOLDER) -> str:
    """The text of BENCHMARKS.md."""
    parts, measured = [HEAD], set()
    for name, (_, title, other) in BENCHMARKS.items():
        for path in sorted(folder.glob(f"{name}-*.json")):
            measured.add(path.stem)
            parts.append(_section(title, other, _load(path)))
    for path in sorted(folder.glob("serve-*.json")):
        measured.add(path.stem)
        title = "The service under 32 clients (`tools.bench_serve`)"
        parts.append(_section(title, "the same work in one process", _load(path)))
    for path in sorted(folder.glob("attention-*.json")):
        measured.add(path.stem)
        parts.append(_attention(_load(path)))
    on_cuda = (*BENCHMARKS.keys() - {"loader"}, "serve", "attention")
    names = sorted(n for n in on_cuda if f"{n}-cuda" not in measured)
    if names:
        parts.append(UNMEASURED.format(names=", ".join(f"{n} on CUDA" for n in names)))
    return "\n".join(parts)


def _section(title: str, other: str, content: dict[str, Any]) -> str:
    around = content["surroundings"]
    lines = [
        f"\n## {title}\n",
        f"`{content['command']}` on {around['hardware']}, {around['cores']} cores, Python "
        f"{around['python']}, torch {around['torch']}, torchvision {around['torchvision']}, timm "
        f"{around['timm']}, Pillow {around['pillow']}, {content['date']}.\n",
        f"| | ours | {other} | ratio | |",
        "|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        spread = f"{row['least']:.2f} to {row['most']:.2f}, " if "least" in row else ""
        share = row.get("share_of_matmul_rate")
        extra = f", {share:.0%} of the card's matmul rate" if share else ""
        lines.append(
            f"| {row['title']} | {row['ours']:,.0f} | {row['theirs']:,.0f} | "
            f"{row['ratio']:.2f}× | {spread}{row['repeats']} turns{extra} |"
        )
    return "\n".join(lines) + "\n"


def _attention(results: list[dict[str, Any]]) -> str:
    """The section of ``tools.bench_attention``'s figures."""
    lines = [
        "\n## CaiT's talking-heads attention\n",
        "`python -m tools.bench_attention`: a training step of the whole model, ours and timm's.\n",
        "| model | | ours, ms | timm's, ms | ratio | memory of timm's |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        amp = "float32" if r["amp"] == "None" else r["amp"]
        how = f"batch {r['batch_size']}, {amp}{', compiled' if r['compile'] else ''}"
        mine, theirs = (1000 * r["step_seconds"][name] for name in ("ours", "timm"))
        lines.append(
            f"| {r['model']} | {how}, {r['hardware']}, torch {r['versions']['torch']} | "
            f"{mine:,.0f} | {theirs:,.0f} | {r['times_faster']:.2f}× | "
            f"{r['share_of_timms_memory']:.0%} ({r['memory']}) |"
        )
    return "\n".join(lines) + "\n"


def run(arguments: argparse.Namespace) -> int:
    """Carry out one benchmark, or write the page."""
    if arguments.name == "report":
        (ROOT / "BENCHMARKS.md").write_text(report(), encoding="utf-8")
        print("wrote BENCHMARKS.md")
        return 0
    device = utils.pick_device("cpu" if arguments.name == "loader" else arguments.device)
    measure, _, _ = BENCHMARKS[arguments.name]
    rows: list[dict[str, Any]] = []
    content = {
        "command": f"python -m tools.benchmark {arguments.name}",
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
        "surroundings": surroundings(device),
    }
    folder = arguments.out or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{arguments.name}-{device.type}.json"
    for row in measure(arguments, device):
        # After each row: a run that is cut short keeps what it has measured.
        rows.append(row)
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = command.parser("benchmark", __doc__)
    parser.add_argument("name", choices=[*BENCHMARKS, "report"])
    parser.add_argument("--device", default="auto", help="as of main.py (default: auto)")
    parser.add_argument("--repeats", type=int, default=9, help="turns (default: 9)")
    parser.add_argument("--models", nargs="+", help="step: these alone")
    parser.add_argument("--out", type=Path, help="folder of the figures (default: benchmarks)")
    parser.add_argument("--pictures", default="", help="loader: a folder of JPEG files")
    return command.run(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
