"""tools.diagnose: the problems of a log.txt."""

import json
import math

import pytest

from tools import diagnose


def curves(train_losses, test_losses, **more) -> list[dict]:
    pairs = enumerate(zip(train_losses, test_losses, strict=True), start=1)
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
    "overfitting": (
        curves(DECAY, [*DECAY[:10], *(0.5 + 0.02 * e for e in range(20))]),
        ["overfitting"],
    ),
    "underfitting": (curves(SLOW, SLOW), ["underfitting"]),
    "mixed but learning": (curves(SLOW, DECAY), []),
    "overfitting, every third epoch validated": (
        [
            record
            if record["epoch"] % 3 == 0
            else {k: v for k, v in record.items() if k != "test_loss"}
            for record in curves(DECAY, [*DECAY[:10], *(0.5 + 0.02 * e for e in range(20))])
        ],
        ["overfitting"],
    ),
    "unfinished": (curves(DECAY[:4], DECAY[:4]), ["unfinished"]),
}


@pytest.mark.parametrize("records, kinds", CASES.values(), ids=CASES.keys())
def test_problems_are_found(records, kinds):
    assert [problem.kind for problem in diagnose.diagnose(records)] == kinds


def test_evidence_names_epochs_and_figures():
    [problem] = diagnose.diagnose(CASES["overfitting"][0])
    assert "epoch 10 " in problem.evidence and "to 0.88" in problem.evidence
    [problem] = diagnose.diagnose(CASES["rising loss"][0])
    assert "1.6 in epoch 4, it was 0.9" in problem.evidence


def test_diagnosis_of_a_real_log(checkpoint, tmp_path, capsys):
    assert diagnose.main([str(checkpoint.parent)]) == 2
    assert "2 epochs show no trend" in capsys.readouterr().err
    log = tmp_path / "log.txt"
    log.write_text("\n".join(map(json.dumps, CASES["null loss"][0])) + "\n{broken")
    assert diagnose.main([str(log), "--json"]) == 0
    [problem] = json.loads(capsys.readouterr().out)
    assert problem["kind"] == "exploding"
    assert diagnose.main([str(tmp_path / "nothing")]) == 2
