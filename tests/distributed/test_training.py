"""Training and evaluation on several processes give what they should, to the last digit."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import (
    PLAIN,
    arguments,
    assert_same_state,
    logged,
    newest,
    on_each_process,
    run_processes,
    train_together,
)

import engine
from augmentation.preprocessing import Preprocessing
from augmentation.transforms import build_transform
from checkpointing.folder import newer_checkpoints
from config import AugmentOptions
from optimization.counts import Evaluation
from pipeline.dataset import ImageDataset
from pipeline.loader import Loader, LoaderSettings
from pipeline.sources.base import ArraySource
from samplers import EvalSampler, ShuffleSampler


def run(images: Path, folder: Path, *options: str, world: int = 2, **variables: str) -> tuple:
    """Exit codes of ``world`` processes, and what they printed."""
    log = folder.with_name(f"{folder.name}.out")
    return run_processes(arguments(images, folder, *options), log, world, **variables)


@pytest.mark.parametrize("repeated", ["--repeated-aug", "--no-repeated-aug"])
def test_resume_on_two_processes_is_exact(images, tmp_path, repeated):
    """Mixup, cutmix, erasing, RandAugment, drop path and average, stopped in mid-epoch."""
    options = ("--epochs", "2", "--batch-size", "2", repeated)
    options += ("--save-every-steps", "4", "--keep", "20")
    expected = train_together(images, tmp_path / "whole", *options)
    folder = tmp_path / "parts"
    train_together(images, folder, *options)
    for later in newer_checkpoints(folder, 1, 16):
        later.rename(tmp_path / later.name)
    again = train_together(images, folder, *options, "--resume", "auto")
    assert_same_state(expected, again)
    assert logged(folder) == logged(tmp_path / "whole")


PLUGIN = """
import os
import numpy as np
from datasets import ArraySource, register_dataset

class Noting(ArraySource):
    def open(self, index):
        if len(self.targets) == 48:
            with open(os.environ["NOTE"], "a") as file:
                file.write(f"{index}\\n")
        return super().open(index)

@register_dataset("noting")
def noting(is_train, options, seed):
    count = 48 if is_train else 4
    images = np.random.default_rng(0).integers(0, 255, (count, 8, 8), dtype=np.uint8)
    return Noting(images, [0, 1] * (count // 2), ["even", "odd"], "noting")
"""


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_another_world_size_sees_each_image_once(images, tmp_path, before, after):
    plugin = tmp_path / "noting.py"
    plugin.write_text(PLUGIN)
    note = tmp_path / "note.txt"
    options = ("--plugin", str(plugin), "--data-set", "noting", "--cache", "none", *PLAIN)
    options += ("--epochs", "2", "--save-every-steps", "2", "--keep", "20")
    folder = tmp_path / "run"
    codes, output = run(images, folder, *options, world=before, NOTE=str(note))
    assert not any(codes), output
    middle = 16
    for later in newer_checkpoints(folder, 0, middle):
        later.rename(tmp_path / later.name)
    seen = newest(folder)["progress"]["samples"]
    assert seen == middle
    first = [int(i) for i in note.read_text().split()]
    note.unlink()
    codes, output = run(
        images,
        folder,
        *options,
        "--resume",
        "auto",
        "--stop-at-epoch",
        "1",
        world=after,
        NOTE=str(note),
    )
    assert not any(codes), output
    assert "no image of the epoch is skipped or repeated" in output
    rest = [int(i) for i in note.read_text().split()]
    # What the first session had seen up to the checkpoint: the processes' notes are interleaved.
    order = ShuffleSampler(48, seed=0).order(0).tolist()
    assert sorted(order[:seen] + rest) == list(range(48))
    assert set(order[:seen]) <= set(first)


def evaluate_random(size: int, world: int, rank: int) -> Evaluation:
    """An evaluation of ``size`` images by a fixed random model."""
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(0, 255, (size, 8, 8), generator=generator, dtype=torch.uint8).numpy()
    targets = torch.randint(0, 7, (size,), generator=generator).tolist()
    source = ArraySource(images, targets, [str(i) for i in range(7)], "random")
    preprocessing = Preprocessing(8, 1.0, "bicubic", (0.5,) * 3, (0.25,) * 3)
    dataset = ImageDataset(source, build_transform(False, preprocessing, AugmentOptions()))
    sampler = EvalSampler(size, num_replicas=world, rank=rank)
    loader = Loader(dataset, sampler, LoaderSettings(batch_size=3))
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 7))
    options = engine.StepSettings(device=torch.device("cpu"))
    return engine.evaluate(model, loader, options, num_classes=7, batch_size=3)


def fingerprint(result: Evaluation) -> list:
    per_class = result.correct_per_class.tolist(), result.count_per_class.tolist()
    return [result.loss.hex(), result.acc1.hex(), result.acc5.hex(), result.count, *per_class]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_evaluation_is_exact_for_every_size_and_world_size(world, tmp_path):
    """Equal to one process's to the last digit, also with fewer images than processes."""
    sizes: list[int] = []

    @settings(max_examples=25, database=None, derandomize=True, deadline=None)
    @given(st.integers(1, 40))
    def collect(size: int) -> None:
        sizes.append(size)

    collect()
    sizes = sorted({1, world - 1, world, world + 1, 3 * world, *sizes})
    expected = [fingerprint(evaluate_random(size, 1, 0)) for size in sizes]

    def work(rank: int) -> list:
        return [fingerprint(evaluate_random(size, world, rank)) for size in sizes]

    assert on_each_process(tmp_path, world, work) == [json.loads(json.dumps(expected))] * world


def test_nonfinite_on_one_process_is_one_decision(images, tmp_path):
    """Only process 1 meets the white image; both stop, and its layer and image are named."""
    plugin = tmp_path / "white.py"
    plugin.write_text(
        "import os\nimport numpy as np\nimport timm\nimport torch\nfrom torch import nn\n"
        "from datasets import ArraySource, register_dataset\n"
        "class Overflow(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.where((x > 1.9).float().mean() > 0.5, x * float('inf'), x)\n"
        "@timm.models.register_model\n"
        "def overflow(pretrained=False, num_classes=2, **kwargs):\n"
        "    return nn.Sequential(nn.Flatten(), Overflow(), nn.Linear(192, num_classes))\n"
        "@register_dataset('white')\n"
        "def white(is_train, options, seed):\n"
        "    images = np.full((16, 8, 8), 30, dtype=np.uint8)\n"
        "    images[5] = 255\n"
        "    return ArraySource(images, [0, 1] * 8, ['a', 'b'], 'white')\n"
    )
    options = ("--plugin", str(plugin), "--data-set", "white", "--model", "overflow", *PLAIN)
    options += ("--epochs", "2", "--batch-size", "1")
    options += ("--mean", "0.5", "--std", "0.25", "--no-model-ema", "--hflip", "0")
    options += ("--train-interpolation", "bilinear", "--on-nonfinite")
    folder = tmp_path / "stop"
    codes, output = run(images, folder, *options, "stop")
    assert codes == [3, 3], output
    names = [json.loads((folder / f"nonfinite-rank{r}.json").read_text()) for r in range(2)]
    guilty = next(r for r in range(2) if "white#5" in names[r]["images"])
    assert f"(process {guilty})" in output
    assert names[guilty]["first_nonfinite"] is not None
    assert names[1 - guilty]["first_nonfinite"] is None
    codes, output = run(images, tmp_path / "skip", *options, "skip")
    assert codes == [0, 0], output
    assert [r["skipped_updates"] for r in logged(tmp_path / "skip")] == [1, 2]
