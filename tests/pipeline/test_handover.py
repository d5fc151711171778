"""pipeline/handover.py: batches through a pipe, and who may be gone by then."""

import os
import resource
import socket
from contextlib import contextmanager
from multiprocessing import Pipe

import numpy as np
import pytest
import torch

from pipeline.dataset import Batch
from pipeline.handover import packed, receive_handle, send_handle, unpacked


def batch_of(images, targets=None, bad=()):
    numbers = torch.arange(2)
    targets = numbers if targets is None else targets
    return Batch(images, targets, numbers + 10, numbers + 20, list(bad), None)


def through_a_pipe(batch):
    theirs, mine = Pipe()
    with theirs, mine:
        content, handle = packed(batch)
        theirs.send_bytes(content)
        if handle is not None:
            send_handle(theirs, handle)
        content = mine.recv_bytes()
        return unpacked(content, None if handle is None else receive_handle(mine))


def open_files():
    return sorted(os.listdir("/proc/self/fd"))


@contextmanager
def no_more_files():
    """This process may open no further file."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


IMAGES = {
    "planes": torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8),
    "by pixel": torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8).permute(0, 3, 1, 2),
    "a part": torch.randint(0, 256, (4, 3, 5, 4), dtype=torch.uint8)[1:3],
    "16 bits": torch.arange(120, dtype=torch.int32).to(torch.uint16).view(2, 3, 5, 4),
    "floats": torch.randn(2, 3, 5, 4),
    "none": torch.empty(0, 3, 0, 0),
}


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
def test_a_batch_arrives_as_it_was(images):
    before = images.clone()
    arrived = through_a_pipe(batch_of(images, bad=["a.png: empty"]))
    assert torch.equal(arrived.images, before) and arrived.images.dtype == before.dtype
    assert arrived.images.stride() == images.stride()
    assert arrived.bad == ["a.png: empty"] and arrived.plan is None
    for name in ("targets", "indices", "positions"):
        expected = getattr(batch_of(images), name)
        assert torch.equal(getattr(arrived, name), expected)
        getattr(arrived, name).add_(1)  # nothing of it is read-only


def test_several_labels_arrive_as_floats():
    targets = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert torch.equal(through_a_pipe(batch_of(IMAGES["planes"], targets)).targets, targets)


def test_nothing_stays_open():
    def one():
        arrived = through_a_pipe(batch_of(IMAGES["floats"].clone()))
        return float(arrived.images.sum())

    first = one()
    before = open_files()
    assert [one() for _ in range(5)] == [first] * 5
    assert open_files() == before


def test_a_batch_outlives_its_sender_though_a_child_of_that_lives_on():
    theirs, mine = Pipe()
    images = torch.from_numpy(np.arange(120, dtype=np.uint8).reshape(2, 3, 5, 4))
    with mine:
        sender = os.fork()
        if not sender:
            content, handle = packed(batch_of(images))
            theirs.send_bytes(content)
            send_handle(theirs, handle)
            if not os.fork():
                mine.close()
                theirs.poll(60)  # until the other end is closed
            os._exit(0)
        theirs.close()
        os.waitpid(sender, 0)
        content = mine.recv_bytes()
        assert torch.equal(unpacked(content, receive_handle(mine)).images, images)


def test_a_default_timeout_of_sockets_leaves_the_pipe_blocking():
    socket.setdefaulttimeout(1)
    try:
        assert torch.equal(through_a_pipe(batch_of(IMAGES["planes"])).images, IMAGES["planes"])
        theirs, mine = Pipe()
        with theirs, mine:
            send_handle(theirs, 0)
            os.close(receive_handle(mine))
            assert os.get_blocking(theirs.fileno()) and os.get_blocking(mine.fileno())
    finally:
        socket.setdefaulttimeout(None)


def test_the_lack_of_file_handles_is_named_on_both_sides():
    theirs, mine = Pipe()
    with theirs, mine:
        batch = batch_of(IMAGES["planes"].clone())
        with no_more_files(), pytest.raises(RuntimeError, match="Too many open files"):
            packed(batch)
        send_handle(theirs, packed(batch)[1])
        with no_more_files(), pytest.raises(OSError, match="Too many open files"):
            receive_handle(mine)
        theirs.close()
        with pytest.raises(EOFError):
            receive_handle(mine)
