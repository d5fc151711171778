"""optimization/counts.py: several right classes per image, against timm's own evaluator."""

import json

import pytest
import torch
from timm.data import RealLabelsImagenet

from optimization.counts import NO_OUTPUT, PADDING, RealCounts


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
