"""optimization/meter.py: how many answers to training images are right."""

import torch
from runs import on_each_process

from optimization.meter import Meter
from optimization.state import Progress


def counted(*batches):
    meter, progress = Meter(torch.device("cpu")), Progress()
    for outputs, targets in batches:
        meter.add_answers(outputs, targets)
    meter.read_into(progress)
    assert meter.answers == 0 and not meter.sums.any()
    return progress.hits, progress.answers


def test_the_greatest_logit_is_compared_with_the_greatest_share():
    torch.manual_seed(0)
    outputs, shares = torch.randn(50, 7), torch.rand(50, 7)
    labels = torch.randint(7, (50,))
    right = sum(
        int(o.tolist().index(max(o.tolist())) == t) for o, t in zip(outputs, labels, strict=True)
    )
    assert counted((outputs, labels)) == (right, 50)
    mixed = sum(
        int(o.tolist().index(max(o.tolist())) == s.tolist().index(max(s.tolist())))
        for o, s in zip(outputs, shares, strict=True)
    )
    assert counted((outputs, labels), (outputs, shares)) == (right + mixed, 100)


def test_answers_of_many_steps_and_dropped_ones():
    meter, progress = Meter(torch.device("cpu")), Progress()
    right, wrong = (
        (torch.eye(3)[:2], torch.tensor([0, 1])),
        (torch.eye(3)[:2], torch.tensor([1, 2])),
    )
    for _ in range(250):
        meter.mark()
        meter.add_answers(*right)
        meter.add_answers(*wrong)
    meter.mark()
    meter.add_answers(*right)
    meter.drop()
    meter.read_into(progress)
    assert (progress.hits, progress.answers) == (500, 1000)


def test_two_heads_answer_by_their_mean_and_copies_once():
    first, second = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0], [0.0, 1.0]])
    assert counted(((first, second), torch.tensor([0, 0]))) == (1, 2)
    copies = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert counted((copies, torch.tensor([0, 1]))) == (1, 2)


def test_what_is_not_a_number_is_no_right_answer_of_a_class_after_it():
    outputs = torch.tensor([[0.0, torch.nan, 5.0]])
    assert counted((outputs, torch.tensor([2]))) == (0, 1)


def test_the_answers_of_all_processes_are_counted(tmp_path):
    def count(rank: int) -> tuple[int, int]:
        labels = torch.tensor([0, 1, 1] if rank else [0, 0])
        return counted((torch.eye(2)[torch.zeros(len(labels), dtype=torch.long)], labels))

    assert on_each_process(tmp_path, 2, count) == [[3, 5], [3, 5]]
