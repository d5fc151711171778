"""optimization/multilabel.py: metrics of several labels, against scikit-learn."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import on_each_process
from sklearn.metrics import average_precision_score, f1_score

from optimization import multilabel
from optimization.multilabel import MultiLabelCounts, rank_class

CPU = torch.device("cpu")


def scored(seed: int = 0, images: int = 90, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with many ties and labels; the third class is never there, the fourth always is."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((images, classes)) < 0.3).astype(np.float32)
    targets[:, 2], targets[:, 3] = 0, 1
    logits = np.round(rng.normal(size=(images, classes)) + targets, 1).astype(np.float32)
    return torch.from_numpy(logits), torch.from_numpy(targets)


def counted(logits: torch.Tensor, targets: torch.Tensor, **options) -> MultiLabelCounts:
    counts = MultiLabelCounts(logits.shape[1], CPU, **options)
    for part in torch.arange(len(logits)).split(8):
        counts.add(logits[part], targets[part])
    return counts


def test_average_precision_and_f1_are_scikit_learns():
    logits, targets = scored()
    result = counted(logits, targets).result()
    present = targets.any(0).numpy()
    answers = (logits >= 0).int().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class without positives
        ap = average_precision_score(targets.numpy(), logits.numpy(), average=None)
    np.testing.assert_allclose(result.ap[present], ap[present], atol=1e-12)
    assert np.isnan(result.ap[2]) and result.left_out() == 1
    scores = result.scores()
    assert scores["map"] == pytest.approx(100 * ap[present].mean(), abs=1e-9)
    f1 = f1_score(targets.numpy(), answers, average=None, zero_division=0)
    assert scores["macro_f1"] == pytest.approx(100 * f1[present].mean())
    micro = f1_score(targets.numpy(), answers, average="micro")
    assert scores["micro_f1"] == pytest.approx(100 * micro)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    assert scores["loss"] == pytest.approx(loss.item(), abs=1e-6)


def test_thresholds_have_the_greatest_f1_of_all():
    logits, targets = scored(1)
    result = counted(logits, targets).result()
    likely = logits.sigmoid().numpy()
    for k in np.flatnonzero(result.positives):
        every = np.r_[0.0, np.unique(likely[:, k])]
        best = max(f1_score(targets[:, k], likely[:, k] >= t) for t in every)
        at = f1_score(targets[:, k], likely[:, k] >= result.thresholds[k])
        assert at == pytest.approx(best) and result.best_f1[k] == pytest.approx(best)
    assert result.thresholds[2] == 0.5
    again = counted(logits, targets, thresholds=result.thresholds.tolist()).result()
    assert again.scores() == result.scores()
    fixed = counted(logits, targets, thresholds=[0.9] * 7).result()
    micro = f1_score(targets.numpy(), (likely >= 0.9).astype(int), average="micro")
    assert fixed.scores()["micro_f1_best"] == pytest.approx(100 * micro)


def test_two_processes_give_the_figures_of_one(tmp_path: Path, monkeypatch):
    """Uneven shares, and classes that are exchanged two at a time."""
    logits, targets = scored(2)
    monkeypatch.setattr(multilabel, "MOST_GATHERED", 5 * 2 * 70 * 2)

    def work(rank: int) -> list:
        part = slice(0, 70) if rank == 0 else slice(70, None)
        counts = counted(logits[part], targets[part])
        counts.add_up()
        result = counts.result()
        return [result.scores(), result.thresholds.tolist(), result.ap.tolist()]

    first, second = on_each_process(tmp_path, 2, work)
    assert first[:2] == second[:2]
    alone = counted(logits, targets).result()
    assert first[0] == alone.scores() and first[1] == alone.thresholds.tolist()
    np.testing.assert_array_equal(first[2], alone.ap)
    present = targets.any(0)
    ap = average_precision_score(targets[:, present].numpy(), logits[:, present].numpy())
    assert first[0]["map"] == pytest.approx(100 * ap, abs=1e-6)


def test_scores_that_are_all_equal_or_missing():
    there = np.array([1, 0, 0, 1], dtype=np.uint8)
    found = rank_class(np.zeros(4, np.float32), there)
    assert found["ap"] == 0.5 and (found["best_hits"], found["best_answers"]) == (2, 4)
    empty = MultiLabelCounts(3, CPU).result()
    assert empty.count == 0 and empty.scores()["map"] == 0


def test_a_logit_that_is_no_number_shows_in_the_loss():
    logits, targets = scored()
    logits[5, 0] = float("nan")
    result = counted(logits, targets).result()
    assert np.isnan(result.loss) and np.isfinite(result.ap[0])


def test_the_table_has_a_row_for_each_class():
    logits, targets = scored()
    result = counted(logits, targets).result()
    header, *rows = result.table(list("abcdefg"))
    assert header == ("class", "positives", "ap", "f1", "threshold", "f1_at_threshold")
    assert rows[2] == ("c", 0, "", "", "0.5000", "")
    assert rows[3][:3] == ("d", 90, "100.00")
    assert result.of_classes([3]).table(["d"])[1] == rows[3]


def test_of_equal_thresholds_the_one_nearest_to_a_half_is_taken():
    likely = np.array([0.9, 0.6, 0.2, 0.1])
    found = rank_class(np.log(likely / (1 - likely)), np.array([1, 0, 0, 1], dtype=np.uint8))
    assert found["threshold"] == pytest.approx(0.75)  # 0.05 has the same F1
