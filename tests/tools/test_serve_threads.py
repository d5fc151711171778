"""tools.serve.threads: cores are divided between model and decoders by their work."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from runs import PATIENCE
from serving import metrics, png, predict, running

from tools.serve import decoder, threads
from tools.serve.decoders import Decoders
from tools.serve.nursery import Nursery
from tools.serve.service import Limits
from tools.serve.threads import Threads


@pytest.mark.parametrize(
    ("model", "decoding", "number"),
    [(30, 3, 15), (1, 1, 8), (1, 3, 4), (0.001, 9, 1), (9, 0.001, 16)],
)
def test_each_gets_cores_as_it_has_work(model, decoding, number):
    """Of 16 cores; the model's seconds on n threads are those of a core over n."""
    shared = Threads(16, divide=True)
    for _ in range(100):
        for _ in range(8):
            shared.count_decoded(decoding)
        shared.count_batch(8, 8 * model / shared.number)
    assert shared.number == number


def test_the_number_follows_when_the_work_changes_and_not_before_there_is_enough():
    shared = Threads(4, divide=True)
    for _ in range(threads.ENOUGH - 1):
        shared.count_decoded(1.0)
    shared.count_batch(threads.ENOUGH, 0.01)
    assert shared.number == 4
    shared.count_decoded(1.0)
    shared.count_batch(1, 0.01)
    assert shared.number == 1
    for _ in range(500):  # clients send smaller images from here on, and the model is slow
        shared.count_decoded(0.001)
        shared.count_batch(1, 0.1)
    assert shared.number == 4


def test_a_fixed_number_stays():
    fixed = Threads(3, divide=False)
    for _ in range(100):
        fixed.count_decoded(1.0)
        fixed.count_batch(1, 0.001)
    assert fixed.number == 3


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_a_decoder_gone_wrong_changes_nothing(seconds):
    shared = Threads(4, divide=True)
    for _ in range(50):
        shared.count_decoded(1.0)
        shared.count_decoded(seconds)
        shared.count_batch(1, 1.0 / shared.number)
    assert shared.number == 2


def test_the_thread_that_runs_the_model_has_them():
    shared = Threads(torch.get_num_threads() + 1, divide=False)

    def in_a_thread():
        a = torch.ones(300, 300)
        a @ a  # from here on a thread keeps what it has
        shared.apply()
        return torch.get_num_threads()

    with ThreadPoolExecutor(1) as pool:
        try:
            assert pool.submit(in_a_thread).result() == shared.number
        finally:
            torch.set_num_threads(shared.number - 1)


def test_a_service_leaves_cores_to_its_decoders(checkpoint, monkeypatch):
    """Large images for a tiny model: decoding is nearly all there is to do."""
    monkeypatch.setattr(threads, "ENOUGH", 2)
    image, limits = png(3000, 2000), Limits()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with (
            running(checkpoint, limits) as (_, port),
            running(checkpoint, limits, divide=False) as (_, other),
        ):
            for _ in range(4):
                assert predict(port, image)[0] == predict(other, image)[0] == 200
            assert metrics(port)["serve_model_threads",] == 1
            assert metrics(other)["serve_model_threads",] == 2
    finally:
        torch.set_num_threads(before)


def _busy(content):
    began = time.process_time()
    while time.process_time() - began < 0.05:
        pass
    return torch.full((1, 1, 1), float(os.getpriority(os.PRIO_PROCESS, 0)))


def test_decoders_say_their_cpu_time_and_give_way():
    seconds: list[float] = []
    with Nursery() as nursery:
        decoders = Decoders(_busy, 1, memory=2**30, nursery=nursery, on_decoded=seconds.append)
        try:
            tensor = decoders.submit(b"", time.monotonic() + PATIENCE).result(PATIENCE)
            own = os.getpriority(os.PRIO_PROCESS, 0)
            assert tensor.item() == min(19, own + decoder.NICENESS)
            assert 0.05 <= seconds[0] < 0.5 and len(seconds) == 1
        finally:
            assert decoders.close(PATIENCE)
