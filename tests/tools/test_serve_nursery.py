"""tools.serve.nursery: decoding processes are forked from a process of their own."""

import ctypes
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import PATIENCE

from distributed.liveness import process_runs
from tools.bench.serve import children
from tools.serve.decoders import Decoders
from tools.serve.nursery import Nursery

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def decode(content):
    """The process's number beside that of the process which it was forked from."""
    return torch.tensor([float(os.getpid()), float(os.getppid()), float(len(content))])[
        :, None, None
    ]


def answer(decoders):
    until = time.monotonic() + PATIENCE
    return [int(number) for number in decoders.submit(b"12345", until).result(PATIENCE).flatten()]


@pytest.fixture
def first_of_a_container():
    """This process gets the orphans of its children, as process 1 does."""
    set_child_subreaper = 36  # linux/prctl.h
    ctypes.CDLL(None).prctl(set_child_subreaper, 1)
    yield
    ctypes.CDLL(None).prctl(set_child_subreaper, 0)


def test_decoders_have_another_parent_which_is_replaced_when_it_is_killed(
    caplog, first_of_a_container
):
    before = set(children(os.getpid()))
    nursery = Nursery()
    [parent] = set(children(os.getpid())) - before
    decoders = Decoders(decode, 1, memory=2**30, nursery=nursery)
    try:
        first, its_parent, size = answer(decoders)
        assert (its_parent, size) == (parent, 5) and first in children(parent)
        os.kill(first, signal.SIGKILL)  # from outside: it costs nothing but the time
        second, its_parent, _ = answer(decoders)
        assert second != first and its_parent == parent
        os.kill(parent, signal.SIGKILL)
        until = time.monotonic() + PATIENCE
        while (process_runs(parent) or process_runs(second)) and time.monotonic() < until:
            time.sleep(0.01)
        third, its_parent, _ = answer(decoders)
        [replaced] = set(children(os.getpid())) - before
        assert its_parent == replaced != parent and third != second
        assert caplog.text.count("it is replaced") == 1
    finally:
        assert decoders.close(PATIENCE)
    nursery.close()  # once more
    assert set(children(os.getpid())) == before
    assert not process_runs(third)


def test_what_it_is_forked_from_keeps_its_files_and_it_keeps_none_of_them():
    """A connection that is closed here is closed for good."""
    read, write = os.pipe()
    with Nursery():
        os.close(write)
        assert os.read(read, 1) == b""
        os.close(read)


def test_a_decoder_that_is_killed_at_once_costs_no_image():
    class Killing(Nursery):
        killed = 0

        def fork(self, theirs):
            child = super().fork(theirs)
            if not self.killed:
                self.killed = child
                os.kill(child, signal.SIGKILL)
                while not re.search(r"State:\s+Z", Path(f"/proc/{child}/status").read_text()):
                    time.sleep(0.01)  # until its end of the connection is closed
            return child

    nursery = Killing()
    decoders = Decoders(decode, 1, memory=2**30, nursery=nursery)
    assert answer(decoders)[0] != nursery.killed > 0
    assert decoders.close(PATIENCE)


def test_one_that_is_frozen_does_not_hold_the_end():
    before = set(children(os.getpid()))
    nursery = Nursery()
    [parent] = set(children(os.getpid())) - before
    decoders = Decoders(decode, 1, memory=2**30, nursery=nursery)
    answer(decoders)
    os.kill(parent, signal.SIGSTOP)
    for child in children(parent):  # a spare thread may have asked for a second one
        os.kill(child, signal.SIGKILL)
    asked = decoders.submit(b"12345", time.monotonic() + PATIENCE)  # waits for another decoder
    decoders.close(0.5)
    assert parent not in children(os.getpid())
    assert isinstance(asked.exception(PATIENCE), Exception)
