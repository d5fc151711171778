"""optimization/counts.py: scores of the classes against scikit-learn; several right classes per
image, against timm's own evaluator."""

import json

import pytest
import torch
from runs import on_each_process
from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score
from timm.data import RealLabelsImagenet

from optimization.counts import NO_OUTPUT, PADDING, Counts, RealCounts


def padded(entries: list[list[int]]) -> torch.Tensor:
    width = max(map(len, entries))
    return torch.tensor([row + [PADDING] * (width - len(row)) for row in entries])


@pytest.mark.parametrize("size", [1, 4, 30])
def test_accuracy_is_that_of_timm(tmp_path, size):
    """In batches of any size and order; images without a label are not counted."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 9, generator=generator)
    entries = [torch.randperm(9, generator=generator)[: i % 4].tolist() for i in range(30)]
    (tmp_path / "real.json").write_text(json.dumps(entries))
    names = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(30)]
    theirs = RealLabelsImagenet(names, real_json=tmp_path / "real.json")
    theirs.add_result(logits)
    counts = RealCounts(padded(entries), 9, torch.device("cpu"))
    for indices in torch.randperm(30, generator=generator).split(size):
        counts.add(logits[indices], indices)
    found = counts.result()
    assert found.count == sum(map(bool, entries)) == 22
    assert found.acc1 == pytest.approx(theirs.get_accuracy(1))
    assert found.acc5 == pytest.approx(theirs.get_accuracy(5))
    assert 0 < found.acc1 < found.acc5 < 100


def test_a_class_that_is_no_output_counts_as_wrong():
    labels = torch.tensor([[NO_OUTPUT, PADDING], [NO_OUTPUT, 1], [PADDING, PADDING]])
    counts = RealCounts(labels, 2, torch.device("cpu"))
    counts.add(torch.tensor([[0.0, 1.0]] * 3), torch.arange(3))
    found = counts.result()
    assert (found.acc1, found.acc5, found.count) == (50.0, None, 2)


# --- scores of the classes --------------------------------------------------------------------


def answered(images: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets of 9 classes: 7 and 8 have no image, 8 has no answer either."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(7, (images,), generator=generator)
    logits = torch.randn(images, 9, generator=generator)
    logits[torch.arange(images), targets] += 1.0
    logits[:, 8] = -9.0
    return logits, targets


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_scores_of_the_classes_are_those_of_scikit_learn():
    logits, targets = answered()
    counts = Counts(9, torch.device("cpu"))
    for rows in torch.arange(60).split(7):
        counts.add(logits[rows], targets[rows])
    scores, answers = counts.result().scores(), logits.argmax(1)
    assert 7 in answers and 8 not in answers
    assert scores["macro_f1"] == pytest.approx(100 * f1_score(targets, answers, average="macro"))
    balanced = 100 * balanced_accuracy_score(targets, answers)
    assert scores["balanced_acc"] == pytest.approx(balanced)
    each = recall_score(targets, answers, average=None, labels=range(7))
    assert scores["worst_class_acc"] == pytest.approx(100 * each.min())
    assert 0 < scores["worst_class_acc"] < scores["balanced_acc"] < 100


def test_scores_of_the_classes_are_the_same_on_two_processes(tmp_path):
    logits, targets = answered()

    def score(rank: int, world: int = 2) -> dict[str, float]:
        counts = Counts(9, torch.device("cpu"))
        counts.add(logits[rank::world], targets[rank::world])
        counts.add_up()
        return counts.result().scores()

    alone = score(0, 1)
    assert on_each_process(tmp_path, 2, score) == [alone, alone]


def test_a_perfect_model_scores_100_and_none_0():
    targets = torch.tensor([0, 1, 1])
    for logits, score in ((torch.eye(2)[targets], 100.0), (-torch.eye(2)[targets], 0.0)):
        counts = Counts(2, torch.device("cpu"))
        counts.add(logits, targets)
        found = counts.result().scores()
        assert [found[n] for n in ("macro_f1", "balanced_acc", "worst_class_acc")] == [score] * 3
