"""The recipes of the worked example of docs/finetune.md on real Fashion-MNIST: a teacher helps."""

import json
from pathlib import Path

from fashion_mnist import first_images, needs_fashion_mnist

import main

ROOT = Path(__file__).resolve().parents[2]


def train(recipe: str, data: Path, folder: Path, *more: str) -> float:
    """The recipe, in ``folder``; returns the last epoch's accuracy in percent."""
    argv = ["--config", f"configs/{recipe}.yaml", "--data-path", str(data), "--device", "cpu"]
    argv += ["--val-interval", "100"]  # the last epoch alone
    assert main.main([*argv, "--output-dir", str(folder), *more]) == 0
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])["test_acc1"]


@needs_fashion_mnist
def test_a_distilled_student_beats_the_same_student_without_a_teacher(tmp_path, monkeypatch):
    """Shorter than the example: the students' labels are poor, and a teacher is worth more."""
    monkeypatch.chdir(ROOT)
    good = first_images(tmp_path / "good", train=6000, test=1000)
    teacher = train("fmnist_teacher", good, tmp_path / "teacher")
    poor = first_images(tmp_path / "poor", train=3000, test=1000, random_labels=0.6)
    plain = train("fmnist_student", poor, tmp_path / "plain", "--epochs", "3")
    weights = ("--teacher-path", str(tmp_path / "teacher" / "best.pth"))
    more = ("--epochs", "3", *weights)
    distilled = train("fmnist_student_distilled", poor, tmp_path / "distilled", *more)
    assert teacher > distilled and plain > 15  # chance is 10
    assert distilled > plain + 10
