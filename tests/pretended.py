"""A CUDA device without a card: its tensors have shapes and types and no values.

What would make the host wait for a device, or mixes devices, raises.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)


class HostWaitsError(AssertionError):
    """The host would wait for the device."""


class _Stream:
    """In the place of CUDA's streams, which need a driver."""

    def __init__(self, *_: object) -> None: ...
    def wait_stream(self, other: object) -> None: ...


class _Event:
    """In the place of CUDA's events: the device is never as far as that."""

    def record(self) -> None: ...

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        raise HostWaitsError("for an event")


class PretendedCuda(TorchDispatchMode):
    """Inside, what is on a CUDA device is a fake tensor; the host's tensors are real.

    Reads of fake values raise torch's DataDependentOutputException or DynamicOutputShapeException,
    mixed devices a RuntimeError, and copies that aren't asynchronous HostWaitsError.

    Attributes:
        strict: whether copies may not wait; the first step of a run may make its constants.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.strict = True
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> "PretendedCuda":
        patch = self.patch
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(torch.cuda, "current_stream", _Stream)
        patch.setattr(torch.cuda, "stream", _entered)
        patch.setattr(Tensor, "record_stream", lambda self, stream: None)
        patch.setattr(Tensor, "backward", _backward)
        # Its presence keeps torch from looking for a driver.
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        self.fake.__exit__(*failure)
        self.patch.undo()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        keywords = keywords or {}
        leaves = tree_leaves((arguments, keywords))
        pretended = any(isinstance(x, FakeTensor) for x in leaves)
        onto = any(isinstance(x, torch.device) and x.type == "cuda" for x in leaves)
        # Pinned memory gets its values from the device.
        onto = onto or bool(keywords.pop("pin_memory", False))
        if not pretended and not onto:
            with unset_fake_temporarily():
                return operation(*arguments, **keywords)
        if self.strict:
            _check_copy(operation, arguments, keywords)
        if operation.overloadpacket.__name__ == "_fused_sgd_":  # torch has no form for shapes alone
            assert all(x.device == CUDA for x in leaves if isinstance(x, Tensor))
            return None
        with self.fake:
            return operation(*arguments, **keywords)

    def place(self, module: nn.Module) -> nn.Module:
        """``module`` with its parameters and buffers on the device."""
        for part in module.modules():
            for table, kind in ((part._parameters, nn.Parameter), (part._buffers, lambda x: x)):
                for name, value in table.items():
                    if value is not None:
                        with self.fake:
                            there = torch.empty_like(value, device=CUDA)
                        table[name] = kind(there)
        return module


@contextmanager
def _entered(_stream: object) -> Iterator[None]:
    yield


def _check_copy(operation: Any, arguments: tuple, keywords: dict) -> None:
    """HostWaitsError for a copy between host and device that isn't asynchronous."""
    name = operation.overloadpacket.__name__
    if name == "_to_copy":
        source = arguments[0].device
        devices = {source.type, (keywords.get("device") or source).type}
    elif name == "copy_":
        devices = {x.device.type for x in arguments[:2]}
    else:
        return
    asynchronous = keywords.get("non_blocking") or arguments[2:3] == (True,)
    if len(devices) > 1 and not asynchronous:
        raise HostWaitsError(f"{name} between {' and '.join(sorted(devices))}")


def _backward(loss: Tensor) -> None:
    """Gradients, without values, for what ``loss`` depends on: autograd itself needs a driver."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [following for following, _ in node.next_functions]
        if (leaf := getattr(node, "variable", None)) is not None:
            leaf.grad = torch.empty_like(leaf)
