"""datasets.py: what users and plug-ins import."""

import subprocess
import sys
from pathlib import Path

import datasets

ROOT = Path(__file__).resolve().parent.parent

PLUGIN = """
import numpy as np
import datasets

@datasets.register_dataset("stripes")
def stripes(is_train, options, seed):
    images = np.tile(np.array([0, 255], np.uint8), (8 if is_train else 4, 8, 4))
    return datasets.ArraySource(images, [0, 1] * (len(images) // 2), ["a", "b"], "stripes")
"""


def test_all_names_are_there():
    assert sorted(datasets.__all__) == datasets.__all__
    for name in datasets.__all__:
        assert getattr(datasets, name).__doc__, name


def test_a_plugin_needs_nothing_else(tmp_path):
    """A set registered, opened, loaded: with what this module exports and the options alone."""
    (tmp_path / "plugin.py").write_text(PLUGIN)
    script = """
import plugin
from datasets import Loader, LoaderSettings, build_dataset, build_transform
from augmentation.transforms import Preprocessing
from config import AugmentOptions, DataOptions
from samplers import EvalSampler

transform = build_transform(
    False, Preprocessing(8, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3), AugmentOptions()
)
images = build_dataset(False, DataOptions(data_set="stripes"), seed=0).with_transform(transform)
loader = Loader(images, EvalSampler(len(images)), LoaderSettings(batch_size=3))
for batch in loader:
    print(tuple(batch.images.shape), batch.targets.tolist(), batch.images.unique().tolist())
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "(3, 3, 8, 8) [0, 1, 0] [-1.0, 1.0]",
        "(1, 3, 8, 8) [1] [-1.0, 1.0]",
    ]
