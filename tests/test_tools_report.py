"""tools.report and tools.diagnose: figures against plain formulas, files, findings."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from after_training import COLORS, make_pictures, train

from inference import load_for_inference
from tools import diagnose, report


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def checkpoint(pictures, tmp_path_factory):
    # A model that learnt little makes mistakes.
    return train(pictures, tmp_path_factory.mktemp("run"), "--lr", "1e-5")


def run(*argv) -> int:
    return report.main([str(a) for a in (*argv, "--device", "cpu", "--num-workers", "0")])


def answers(probabilities, targets) -> report.Answers:
    targets = np.array(targets)
    probabilities = np.array(probabilities, dtype=np.float32)
    return report.Answers(probabilities, targets, np.arange(len(targets)), [], 1.0, 1.0)


@pytest.fixture(scope="module")
def written(checkpoint):
    assert run(checkpoint) == 0
    return checkpoint.parent / "report"


# --- figures --------------------------------------------------------------------------------------


def by_hand(checkpoint, pictures) -> tuple[np.ndarray, np.ndarray]:
    """(N,) predictions and targets of the validation part, one picture at a time."""
    from PIL import Image

    model, transform, names = load_for_inference(checkpoint)
    predictions, targets = [], []
    with torch.no_grad():
        for label, name in enumerate(names):
            for path in sorted((pictures / "val" / name).iterdir()):
                with Image.open(path) as image:
                    predictions.append(int(model(transform(image)[None]).argmax()))
                targets.append(label)
    return np.array(predictions), np.array(targets)


def test_figures_are_those_of_the_pictures(written, checkpoint, pictures):
    predictions, targets = by_hand(checkpoint, pictures)
    content = json.loads((written / "report.json").read_text())
    assert content["pictures"] == 18 and content["top5"] is None
    assert content["top1"] == pytest.approx(np.mean(predictions == targets))
    last = diagnose.records_of(checkpoint.parent)[-1]
    assert content["log_loss"] == pytest.approx(last["test_loss"], abs=1e-5)
    matrix = np.zeros((3, 3), dtype=int)
    for true, said in zip(targets, predictions, strict=True):
        matrix[true, said] += 1
    rows = list(csv.reader((written / "confusion.csv").read_text().splitlines()))
    assert rows[0][1:] == list(COLORS) == [row[0] for row in rows[1:]]
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
    measured = report.calibration(answers(probabilities, targets), bins=10)
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
    assert report.calibration(answers(sure, [0, 0, 0, 0]))["ece"] == 0
    assert report.calibration(answers(sure, [1, 1, 1, 1]))["ece"] == 1
    assert report.calibration(answers([[0.75, 0.25]] * 4, [0, 0, 0, 1]))["ece"] == 0


def test_top5_counts_the_five_likeliest():
    probabilities = np.full((2, 7), 0.1)
    probabilities += np.arange(7) / 100
    # Class 2 is the fifth likeliest, class 1 the sixth.
    given = answers(probabilities / probabilities.sum(1, keepdims=True), [2, 1])
    content = report.figures(given, [str(i) for i in range(7)])
    assert content["top5"] == 0.5 and content["top1"] == 0


def test_a_class_without_pictures_does_not_lower_the_means():
    content = report.figures(answers([[0.9, 0.1, 0.0]] * 3, [0, 0, 0]), ["a", "b", "c"])
    assert content["macro_f1"] == content["balanced_accuracy"] == 1
    assert [row["pictures"] for row in content["per_class"]] == [3, 0, 0]


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


def test_other_pictures_may_be_judged(checkpoint, pictures, tmp_path):
    table = pictures / "table.csv"
    table.write_text(
        "path,label\nval/amber/0.png,amber\nval/blue/0.png,blue\nval/blue/1.png,blue\n"
        "missing.png,crimson\n"
    )
    assert run(checkpoint, "--data-path", table, "--output", tmp_path) == 0
    content = json.loads((tmp_path / "report.json").read_text())
    assert [row["pictures"] for row in content["per_class"]] == [1, 2, 0]
    assert len(content["unreadable"]) == 1 and "missing.png" in content["unreadable"][0]


def test_pictures_of_other_classes_are_an_error(checkpoint, tmp_path, capsys):
    (tmp_path / "val" / "green").mkdir(parents=True)
    (tmp_path / "val" / "green" / "0.png").touch()
    assert run(checkpoint, "--data-path", tmp_path) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "green" in err


# --- diagnosis ------------------------------------------------------------------------------------


def curves(train_losses, test_losses, **more) -> list[dict]:
    pairs = enumerate(zip(train_losses, test_losses, strict=True))
    return [{"epoch": e, "train_loss": a, "test_loss": b, **more} for e, (a, b) in pairs]


DECAY = [2.3 * math.exp(-e / 2) + 0.2 for e in range(30)]
SLOW = [2.3 - 0.01 * e for e in range(30)]
CASES = {
    "fine": (curves(DECAY, DECAY), []),
    "null loss": (curves([2.3, 1.9, None], [2.3, 2, 2]), ["exploding"]),
    "null test loss": (curves([2.3, 1.9, 1.8], [2.3, 2, None]), ["exploding"]),
    "rising loss": (curves([2.3, 1.0, 0.9, 1.6], [2.3, 1, 1, 1]), ["exploding"]),
    "skipped": (curves(DECAY, DECAY, skipped_updates=3), ["exploding"]),
    "flat": (curves([2.303, 2.302, 2.303, 2.3], [2.3] * 4), ["flat"]),
    "overfitting": (curves(DECAY, [*DECAY[:10], *(0.5 + 0.02 * e for e in range(20))]),
                    ["overfitting"]),
    "underfitting": (curves(SLOW, SLOW), ["underfitting"]),
    "mixed but learning": (curves(SLOW, DECAY), []),
    "unfinished": (curves(DECAY[:4], DECAY[:4]), ["unfinished"]),
}  # fmt: skip


@pytest.mark.parametrize("records, kinds", CASES.values(), ids=CASES.keys())
def test_findings(records, kinds):
    assert [finding.kind for finding in diagnose.diagnose(records)] == kinds


def test_evidence_names_epochs_and_figures():
    [finding] = diagnose.diagnose(CASES["overfitting"][0])
    assert "epoch 10 " in finding.evidence and "to 0.88" in finding.evidence
    [finding] = diagnose.diagnose(CASES["rising loss"][0])
    assert "1.6 in epoch 4, it was 0.9" in finding.evidence


def test_diagnosis_of_a_real_log(checkpoint, tmp_path, capsys):
    assert diagnose.main([str(checkpoint.parent)]) == 2
    assert "2 epochs show no trend" in capsys.readouterr().err
    log = tmp_path / "log.txt"
    log.write_text("\n".join(map(json.dumps, CASES["null loss"][0])) + "\n{broken")
    assert diagnose.main([str(log), "--json"]) == 0
    [finding] = json.loads(capsys.readouterr().out)
    assert finding["kind"] == "exploding"
    assert diagnose.main([str(tmp_path / "nothing")]) == 2


def test_the_report_tells_the_diagnosis(checkpoint, tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("\n".join(map(json.dumps, CASES["flat"][0])))
    assert run(checkpoint, "--log", log, "--output", tmp_path) == 0
    assert json.loads((tmp_path / "report.json").read_text())["training"][0]["kind"] == "flat"
    assert "Flat: the training loss is 2.303" in (tmp_path / "report.html").read_text()
