"""pipeline/handover.py: batches through a pipe, and who may be gone by then."""

import errno
import os
import socket
import threading
import time
from multiprocessing import Pipe

import numpy as np
import pytest
import torch
from open_files import most_files

from augmentation.protocol import Plan
from pipeline import handover
from pipeline.dataset import Batch
from pipeline.handover import packed, receive, send

COUNT = 2


def batch_of(images, targets=None, bad=(), plan=None):
    numbers = torch.arange(COUNT)
    targets = numbers if targets is None else targets
    return Batch(images, targets, numbers + 10, numbers + 20, list(bad), plan)


def through_a_pipe(answer):
    theirs, mine = Pipe()
    with theirs, mine:
        send(theirs, packed(answer))
        return receive(mine)


IMAGES = {
    "planes": torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8),
    "by pixel": torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8).permute(0, 3, 1, 2),
    "a part": torch.randint(0, 256, (4, 3, 5, 4), dtype=torch.uint8)[1:3],
    "16 bits": torch.arange(120, dtype=torch.int32).to(torch.uint16).view(2, 3, 5, 4),
    "floats": torch.randn(2, 3, 5, 4),
    "none": torch.empty(0, 3, 0, 0),
}


@pytest.mark.parametrize("by_handle", [True, False])
@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
def test_a_batch_arrives_as_it_was(images, by_handle, monkeypatch):
    if not by_handle:
        monkeypatch.delattr(socket, "send_fds")
    before = images.clone()
    arrived = through_a_pipe(batch_of(images, bad=["a.png: empty"]))
    assert torch.equal(arrived.images, before) and arrived.images.dtype == before.dtype
    assert not images.numel() or arrived.images.stride() == images.stride()
    assert arrived.bad == ["a.png: empty"] and arrived.plan is None
    for name in ("targets", "indices", "positions"):
        expected = getattr(batch_of(images), name)
        assert torch.equal(getattr(arrived, name), expected)
        getattr(arrived, name).add_(1)  # nothing of it is read-only


@pytest.mark.parametrize("images", [IMAGES["floats"], IMAGES["none"]])
@pytest.mark.parametrize("labels", [3, 100_000])
def test_large_targets_and_plans_leave_the_pipe_free(labels, images):
    """A worker that makes batches ahead isn't held by them."""
    targets = torch.rand(COUNT, labels).round()
    arrays = [np.arange(COUNT * labels).reshape(COUNT, labels) for _ in Plan._fields]
    theirs, mine = Pipe()
    with theirs, mine:
        for _ in range(4):  # nobody reads meanwhile
            send(theirs, packed(batch_of(images.clone(), targets, plan=Plan(*arrays))))
        for _ in range(4):
            arrived = receive(mine)
            assert torch.equal(arrived.targets, targets) and torch.equal(arrived.images, images)
            assert all(map(np.array_equal, arrived.plan, arrays))


def test_an_error_arrives():
    for text in ("short", "x" * 10**6):
        arrived = through_a_pipe(ValueError(text))
        assert type(arrived) is ValueError and str(arrived) == text


def test_nothing_stays_open():
    def one():
        arrived = through_a_pipe(batch_of(IMAGES["floats"].clone(), torch.ones(2, 50_000)))
        return float(arrived.images.sum())

    first = one()
    before = sorted(os.listdir("/proc/self/fd"))
    assert [one() for _ in range(5)] == [first] * 5
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_batch_outlives_its_sender_though_a_child_of_that_lives_on():
    theirs, mine = Pipe()
    images = torch.from_numpy(np.arange(120, dtype=np.uint8).reshape(2, 3, 5, 4))
    with mine:
        sender = os.fork()
        if not sender:
            send(theirs, packed(batch_of(images)))
            if not os.fork():
                mine.close()
                theirs.poll(60)  # until the other end is closed
            os._exit(0)
        theirs.close()
        os.waitpid(sender, 0)
        assert torch.equal(receive(mine).images, images)


@pytest.mark.parametrize("by_handle", [True, False])
@pytest.mark.parametrize("count", [0, 2, 40])
def test_a_sender_that_ends_within_a_message_is_gone(count, by_handle, monkeypatch):
    if not by_handle:
        monkeypatch.delattr(socket, "send_fds")
    theirs, mine = Pipe()
    with mine:
        with theirs:
            os.write(theirs.fileno(), b"\0\0\1\0" + bytes(count - 4) if count > 4 else bytes(count))
        with pytest.raises(EOFError):
            receive(mine)


def test_a_default_timeout_of_sockets_leaves_the_pipe_blocking():
    socket.setdefaulttimeout(0.01)
    theirs, mine = Pipe()
    try:
        with theirs, mine:
            late = threading.Timer(0.2, send, (theirs, packed(batch_of(IMAGES["planes"]))))
            late.start()
            assert torch.equal(receive(mine).images, IMAGES["planes"])
            assert os.get_blocking(theirs.fileno()) and os.get_blocking(mine.fileno())
    finally:
        socket.setdefaulttimeout(None)


def test_the_lack_of_file_handles_is_named_on_both_sides():
    theirs, mine = Pipe()
    with theirs, mine:
        batch = batch_of(IMAGES["planes"].clone(), torch.ones(2, 50_000))
        with most_files(0), pytest.raises(RuntimeError, match="Too many open files"):
            packed(batch)
        for more in (0, 1, 2):  # for no handle, for one of two, for none that torch copies
            send(theirs, packed(batch))
            with most_files(more), pytest.raises(OSError, match="Too many open files"):
                receive(mine)
        send(theirs, packed(batch))
        assert torch.equal(receive(mine).images, batch.images)


@pytest.mark.parametrize("times", [3, 10**6])
def test_too_many_handles_on_their_way_are_waited_for_and_then_named(times, monkeypatch):
    monkeypatch.setattr(handover, "PATIENCE", 0.2)
    tries = iter(range(times))
    usual = socket.send_fds

    def refused(*given):
        if next(tries, None) is not None:
            raise OSError(errno.ETOOMANYREFS, "too many references")
        return usual(*given)

    monkeypatch.setattr(socket, "send_fds", refused)
    began = time.monotonic()
    if times == 3:
        assert torch.equal(through_a_pipe(batch_of(IMAGES["floats"])).images, IMAGES["floats"])
    else:
        with pytest.raises(OSError, match="Too many open files"):
            through_a_pipe(batch_of(IMAGES["floats"]))
        assert time.monotonic() - began >= 0.2
