"""datasets.py: what users and plug-ins import."""

import subprocess
import sys
from pathlib import Path

import pytest

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
from augmentation.preprocessing import Preprocessing
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


HOST = """
import sys, threading
{first}
sys.path.{place}({root!r})
from inference import load_for_inference
import main

argv = ["--data-set", "stand_in", "--plugin", {plugin!r}, "--model", "simple_cnn"]
argv += ["--input-size", "32", "--batch-size", "4", "--epochs", "1", "--warmup-epochs", "0"]
argv += ["--num-workers", "1", "--cache", "none", "--device", "cpu", "--no-tensorboard"]
argv += ["--output-dir", "run"]
codes = []
for more in ([], ["--eval", "--resume", "run/best.pth"]):
    thread = threading.Thread(target=lambda: codes.append(main.main([*argv, *more])))
    thread.start()
    thread.join()
assert codes == [0, 0], codes
assert load_for_inference("run/best.pth").class_names == ["a", "b"]
loaded = sys.modules.get("datasets")
print("datasets:", loaded and loaded.__file__)
"""
STAND_IN = """
import numpy as np
from pipeline.sources.base import ArraySource
from pipeline.sources.registry import register_dataset

@register_dataset("stand_in")
def stand_in(is_train, options, seed):
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32), np.uint8)
    return ArraySource(images, [0, 1] * 4, ["a", "b"], "stand_in")
"""


@pytest.mark.parametrize(
    "first, place",
    [
        (
            "import datasets",
            "insert(0, ",
        ),
        ("", "append("),
    ],
    ids=["before", "behind"],
)
def test_a_program_that_has_another_datasets_trains_from_a_thread(tmp_path, first, place):
    """As in a notebook or a service: neither package takes the name from the other."""
    (tmp_path / "site" / "datasets").mkdir(parents=True)
    (tmp_path / "site" / "datasets" / "__init__.py").write_text("")
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    code = HOST.replace("sys.path.{place}({root!r})", f"sys.path.{place}{str(ROOT)!r})")
    code = code.format(first=first, plugin=str(tmp_path / "stand_in.py"))
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    package = tmp_path / "site" / "datasets" / "__init__.py" if first else None
    assert run.stdout.splitlines()[-1] == f"datasets: {package}"


def test_who_looks_for_the_other_package_is_told():
    with pytest.raises(AttributeError, match="datasets.py has no load_dataset: if Hugging Face's"):
        datasets.load_dataset  # noqa: B018
