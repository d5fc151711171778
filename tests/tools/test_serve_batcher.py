"""tools.serve.batcher: what is answered together."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tools.serve.batcher import Batcher


def test_what_waits_is_answered_together_and_each_gets_its_own():
    entered, go, sizes = threading.Event(), threading.Event(), []

    def answers(images):
        entered.set()
        go.wait(5)
        return images.flatten(1)

    pool = ThreadPoolExecutor(1)
    batcher = Batcher(
        lambda content, until: pool.submit(lambda: torch.full((1, 1, 1), float(content))),
        answers,
        max_batch=3,
        max_wait=0.0,
        on_batch=lambda size, seconds: sizes.append(size),
    )
    first = batcher.ask(b"0", 0.0)
    assert entered.wait(5)
    later = [batcher.ask(str(n).encode(), 0.0) for n in range(1, 6)]
    bad, late = batcher.ask(b"no number", 0.0), batcher.ask(b"7", 0.0)
    assert late.cancel() and batcher.stalled() > 0
    with pytest.raises(ValueError):
        bad.result(5)
    go.set()
    assert [f.result(5).probabilities.tolist() for f in (first, *later)] == [
        [float(n)] for n in range(6)
    ]
    pool.shutdown()
    assert batcher.close(5)
    assert sizes == [1, 3, 2] and batcher.stalled() == 0


def test_an_image_waits_for_others_but_not_for_long():
    sizes, pool = [], ThreadPoolExecutor(1)
    batcher = Batcher(
        lambda content, until: pool.submit(lambda: torch.zeros(1, 1, 1)),
        lambda images: images.flatten(1),
        max_batch=8,
        max_wait=0.5,
        on_batch=lambda size, seconds: sizes.append(size),
    )
    for future in [batcher.ask(b"", 0.0) for _ in range(3)]:
        future.result(5)
    pool.shutdown()
    assert batcher.close(5)
    assert sizes == [3]
