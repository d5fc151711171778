"""tools.report: figures against plain formulas, and files.

Also of tools/common/answers.py and tools/common/page.py.
"""

import csv
import json

import numpy as np
import pytest
import torch
from after_training import train
from tiny_images import COLOURS

from inference import load_for_inference
from tools import diagnose, report
from tools.common.answers import Answers, calibration


@pytest.fixture(scope="module")
def checkpoint(images, tmp_path_factory):
    # A model that learnt little makes mistakes.
    return train(images, tmp_path_factory.mktemp("run"), "--lr", "2e-6")


def run(*argv) -> int:
    return report.main([str(a) for a in (*argv, "--device", "cpu", "--num-workers", "0")])


def calibration_of(given: Answers, **options):
    return calibration(given.confidences, given.predictions == given.targets, **options)


def answers(probabilities, targets) -> Answers:
    targets = np.array(targets)
    probabilities = np.array(probabilities, dtype=np.float32)
    return Answers(probabilities, targets, np.arange(len(targets)), [], 1.0, 1.0)


@pytest.fixture(scope="module")
def written(checkpoint):
    assert run(checkpoint) == 0
    return checkpoint.parent / "report"


# --- figures --------------------------------------------------------------------------------------


def by_hand(checkpoint, images) -> tuple[np.ndarray, np.ndarray]:
    """(N,) predictions and targets of the validation part, one image at a time."""
    from PIL import Image

    model, transform, names = load_for_inference(checkpoint)
    predictions, targets = [], []
    with torch.no_grad():
        for label, name in enumerate(names):
            for path in sorted((images / "val" / name).iterdir()):
                with Image.open(path) as image:
                    predictions.append(int(model(transform(image)[None]).argmax()))
                targets.append(label)
    return np.array(predictions), np.array(targets)


def test_figures_are_those_of_the_images(written, checkpoint, images):
    predictions, targets = by_hand(checkpoint, images)
    content = json.loads((written / "report.json").read_text())
    assert content["images"] == 18 and content["top5"] is None
    assert content["top1"] == pytest.approx(np.mean(predictions == targets))
    last = diagnose.records_of(checkpoint.parent)[-1]
    assert content["log_loss"] == pytest.approx(last["test_loss"], abs=1e-5)
    matrix = np.zeros((3, 3), dtype=int)
    for true, said in zip(targets, predictions, strict=True):
        matrix[true, said] += 1
    rows = list(csv.reader((written / "confusion.csv").read_text().splitlines()))
    assert rows[0][1:] == list(COLOURS) == [row[0] for row in rows[1:]]
    assert np.array_equal(np.array([row[1:] for row in rows[1:]], dtype=int), matrix)
    for label, row in enumerate(content["per_class"]):
        right, said = matrix[label, label], matrix[:, label].sum()
        precision, recall = right / max(said, 1), right / matrix[label].sum()
        assert row["precision"] == pytest.approx(precision)
        assert row["recall"] == pytest.approx(recall)
        assert row["f1"] == pytest.approx(2 * precision * recall / max(precision + recall, 1e-9))
    wrong = [m["confidence"] for m in content["mistakes"]]
    assert len(wrong) == (predictions != targets).sum() > 0
    assert wrong == sorted(wrong, reverse=True)


def test_calibration_error_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet((0.5,) * 4, size=500).astype(np.float32)
    targets = rng.integers(0, 4, 500)
    measured = calibration_of(answers(probabilities, targets), bins=10)
    # Guo et al. 2017, equation 3, bin by bin.
    expected, counts = 0.0, []
    for low in range(10):
        members = [
            (p.max(), p.argmax() == t)
            for p, t in zip(probabilities.astype(float), targets, strict=True)
            if low / 10 < p.max() <= (low + 1) / 10
        ]
        counts.append(len(members))
        if members:
            accuracy = sum(right for _, right in members) / len(members)
            confidence = sum(c for c, _ in members) / len(members)
            expected += len(members) / 500 * abs(accuracy - confidence)
    assert measured["ece"] == pytest.approx(expected)
    assert measured["bins"]["count"] == counts


def test_a_calibrated_model_has_no_error_and_an_overconfident_one_all():
    sure = [[1.0, 0.0]] * 4
    assert calibration_of(answers(sure, [0, 0, 0, 0]))["ece"] == 0
    assert calibration_of(answers(sure, [1, 1, 1, 1]))["ece"] == 1
    assert calibration_of(answers([[0.75, 0.25]] * 4, [0, 0, 0, 1]))["ece"] == 0


def test_top5_counts_the_five_likeliest():
    probabilities = np.full((2, 7), 0.1)
    probabilities += np.arange(7) / 100
    # Class 2 is the fifth likeliest, class 1 the sixth.
    given = answers(probabilities / probabilities.sum(1, keepdims=True), [2, 1])
    content = report.figures(given, [str(i) for i in range(7)])
    assert content["top5"] == 0.5 and content["top1"] == 0


def test_a_class_without_images_does_not_lower_the_means():
    content = report.figures(answers([[0.9, 0.1, 0.0]] * 3, [0, 0, 0]), ["a", "b", "c"])
    assert content["macro_f1"] == content["balanced_accuracy"] == 1
    assert [row["images"] for row in content["per_class"]] == [3, 0, 0]


# --- files ----------------------------------------------------------------------------------------


def test_the_page_needs_no_other_file(written):
    text = (written / "report.html").read_text()
    assert "http://" not in text and "https://" not in text
    assert text.count("data:image/png") == len(
        json.loads((written / "report.json").read_text())["mistakes"]
    )
    assert text.count("data:image/svg+xml") == 2
    assert text.count('<figure style="max-width: 150px"><img width="112"') == text.count(
        "image/png"
    )
    assert (written / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_other_images_may_be_evaluated(checkpoint, images, tmp_path):
    table = images / "table.csv"
    table.write_text(
        "path,label\nval/amber/0.png,amber\nval/blue/0.png,blue\nval/blue/1.png,blue\n"
        "missing.png,crimson\n"
    )
    assert run(checkpoint, "--data-path", table, "--output", tmp_path) == 0
    content = json.loads((tmp_path / "report.json").read_text())
    assert [row["images"] for row in content["per_class"]] == [1, 2, 0]
    assert len(content["unreadable"]) == 1 and "missing.png" in content["unreadable"][0]


def test_images_of_other_classes_are_an_error(checkpoint, tmp_path, capsys):
    (tmp_path / "val" / "green").mkdir(parents=True)
    (tmp_path / "val" / "green" / "0.png").touch()
    assert run(checkpoint, "--data-path", tmp_path) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "green" in err


def test_the_report_shows_the_diagnosis(checkpoint, tmp_path):
    log = tmp_path / "log.txt"
    flat = [{"epoch": e, "train_loss": 2.3, "test_loss": 2.3} for e in range(1, 5)]
    log.write_text("\n".join(map(json.dumps, flat)))
    assert run(checkpoint, "--log", log, "--output", tmp_path) == 0
    assert json.loads((tmp_path / "report.json").read_text())["training"][0]["kind"] == "flat"
    assert "Flat: the training loss is 2.3 " in (tmp_path / "report.html").read_text()
