"""pipeline/prefetch.py without a second stream; on CUDA see tests/test_cuda.py."""

import torch

from pipeline.prefetch import prefetch


def test_on_a_host_no_batch_is_taken_before_it_is_asked_for_or_copied():
    """A signal between two steps must find the counters where the batches are."""
    taken = []

    def batches():
        for number in range(3):
            taken.append(number)
            yield number

    def place(tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("copied twice")

    stream = prefetch(batches(), torch.device("cpu"), place)
    assert (next(stream), taken) == (0, [0])
    assert (next(stream), taken) == (1, [0, 1])
    assert list(stream) == [2]
