"""Updates that are left out where the device says so, without waiting for it.

Fused optimisers look at a flag themselves. Every other one takes its step in any case, and what it
changed is put back on the device where the step was bad: parameters and state are copied before the
step and selected after it. Numbers that an optimiser keeps on the host, such as the number of
steps, are put back once the flag has come to the host.
"""

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distributed.wrapping import flag_like, local
from optimization.optimizer import optimizer_supports_found_inf

Undo = Callable[[], object]
# Bytes of a tensor of which a copy costs less than the launch of a kernel.
_SMALL = 1 << 20


class Guard:
    """The steps of an optimiser, each of which a flag on the device may leave out.

    A step that is left out leaves weights, optimiser and loss scaler, bit for bit, as if it had
    never been. Numbers on the host are right after :meth:`settle`.

    Args:
        optimizer: any.
        scaler: the loss scaler of fp16; the gradients are unscaled already.
        sticky: once a step is left out, so are all that follow until :meth:`settle`; then the host
            never waits. Otherwise, and with a scaler, which leaves out steps as a matter of course,
            the next step must know the host's numbers. Where there are any, the host waits for the
            flag of the step before: by then the device has a forward and a backward pass to do, or
            is done with all.
        waits: read the flag at once, where that costs nothing (CPU).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
        *,
        sticky: bool,
        waits: bool,
    ) -> None:
        self.optimizer, self.scaler = optimizer, scaler
        self.sticky = sticky and scaler is None
        # Kron has a generator of its own, which nothing but a read can spare.
        complete = optimizer.state_dict().keys() == {"state", "param_groups"}
        self.waits = waits or not complete
        self.fused = optimizer_supports_found_inf(optimizer)
        # Flags on their way to the host, and what puts the host's numbers back: oldest first.
        self._pending: deque[tuple[HostFlag, list[Undo]]] = deque()

    @torch.no_grad()
    def step(self, bad: Tensor) -> None:
        """Update the weights and the scale, unless ``bad``, a bool on the device, is true.

        A gradient that overflows with a scaler leaves out the weights alone: the scale adapts.
        """
        if self.scaler is None:
            self._step(bad)
            return
        overflows = self.scaler._found_inf_per_device(self.optimizer).values()
        self._step(torch.stack([bad, *(flag.to(bad.device) > 0 for flag in overflows)]).any())
        # A loss that is not finite says nothing of the scale.
        adapting = (self.scaler._scale, self.scaler._growth_tracker)
        before = [value.clone() for value in adapting]
        self.scaler.update()
        _put_back(bad, adapting, before)

    def settle(self) -> None:
        """Wait for the flags and put back the host's numbers where a step was left out."""
        while self._pending:
            self._look()

    def _step(self, bad: Tensor) -> None:
        optimizer = self.optimizer
        if self.fused:
            first = optimizer.param_groups[0]["params"][0]
            optimizer.found_inf = flag_like(bad.to(torch.float32), first)
            optimizer.step()
            del optimizer.found_inf
        elif self.waits:
            if not bool(bad):
                optimizer.step()
        else:
            while self._pending and (not self.sticky or self._pending[0][0].arrived()):
                self._look()
            before = _Values(optimizer)
            optimizer.step()
            undo = before.put_back(bad)
            if undo:
                self._pending.append((HostFlag(bad), undo))

    def _look(self) -> None:
        """Read the oldest flag; where it says so, go back to before its step."""
        flag, undo = self._pending.popleft()
        if flag:
            # Those that follow were left out too.
            later = [one for _, undone in self._pending for one in undone]
            self._pending.clear()
            for one in reversed(undo + later):
                one()


class HostFlag:
    """A bool of the device on its way to the host; true or false once it has come."""

    def __init__(self, flag: Tensor) -> None:
        self._value = torch.empty((), dtype=torch.bool, pin_memory=flag.is_cuda)
        self._value.copy_(flag, non_blocking=True)
        self._event = torch.cuda.Event() if flag.is_cuda else None
        if self._event:
            self._event.record()

    def arrived(self) -> bool:
        """Whether it has come; doesn't wait."""
        return self._event is None or self._event.query()

    def __bool__(self) -> bool:
        if self._event:
            self._event.synchronize()
        return bool(self._value)


class _Values:
    """What a step of ``optimizer`` may change, as it is now."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # Lookahead keeps all state in the optimiser that it wraps.
        self.state = getattr(optimizer, "_base_optimizer", optimizer).state
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.parameters = [p for p in parameters if p.grad is not None]
        self.new = [p for p in self.parameters if p not in self.state]
        tables = [*optimizer.param_groups, *self.state.values()]
        self.tables = [(table, dict(table)) for table in tables]
        tensors = [v for _, old in self.tables for v in old.values() if isinstance(v, Tensor)]
        self.numbers = {id(v): v.item() for v in tensors if _is_number(v)}
        moving = [*self.parameters, *(v for v in tensors if id(v) not in self.numbers)]
        self.copies = _Copies({id(v): local(v) for v in moving})

    def put_back(self, bad: Tensor) -> list[Undo]:
        """Put back the device's values where ``bad``; returns what puts back the host's."""
        undo = [partial(self.state.pop, p) for p in self.new if p in self.state]
        for table, old in self.tables:
            undo += [partial(table.pop, key) for key in table.keys() - old.keys()]
            for key, was in old.items():
                now = table.get(key)
                if isinstance(was, Tensor) and id(was) in self.numbers:
                    number = self.numbers[id(was)]
                    if now is not was or was.item() != number:
                        undo += [partial(was.fill_, number), partial(table.update, {key: was})]
                elif now is was:
                    continue
                elif isinstance(was, Tensor) and _alike(was, now):
                    # Another tensor in its place, which is the one to put right.
                    self.copies.replace(id(was), local(now))
                elif isinstance(was, Tensor) or isinstance(now, Tensor) or now != was:
                    undo.append(partial(table.update, {key: was}))
        self.copies.put_back(bad)
        return undo


class _Copies:
    """Copies of tensors that belong together, by key.

    Small ones are copied and selected as one, so that a model of hundreds of vectors costs a
    handful of kernels and not one for each.
    """

    def __init__(self, tensors: dict[int, Tensor]) -> None:
        self.small: dict[torch.dtype, dict[int, Tensor]] = {}
        self.large: dict[int, Tensor] = {}
        for key, tensor in tensors.items():
            if tensor.nbytes <= _SMALL and tensor.is_contiguous():
                self.small.setdefault(tensor.dtype, {})[key] = tensor.view(-1)
            else:
                self.large[key] = tensor
        self.joined = {dtype: torch.cat(list(x.values())) for dtype, x in self.small.items()}
        self.before = [torch.empty_like(x) for x in self.large.values()]
        if self.before:
            torch._foreach_copy_(self.before, list(self.large.values()))

    def replace(self, key: int, tensor: Tensor) -> None:
        """``tensor``, of the same layout, is now what has to be put back."""
        if key in self.large:
            self.large[key] = tensor
        else:
            self.small[tensor.dtype][key] = tensor.view(-1)

    def put_back(self, bad: Tensor) -> None:
        """The copies where ``bad``."""
        _put_back(bad, self.large.values(), self.before)
        for dtype, tensors in self.small.items():
            values = list(tensors.values())
            joined = torch.where(bad, self.joined[dtype], torch.cat(values))
            torch._foreach_copy_(values, joined.split([x.numel() for x in values]))


def _is_number(value: Tensor) -> bool:
    """Whether an optimiser's tensor is a counter on the host."""
    return value.device.type == "cpu" and value.numel() == 1


def _alike(was: Tensor, now: Any) -> bool:
    """Whether the values of ``was`` may be put into ``now``."""
    if not isinstance(now, Tensor) or (now.shape, now.dtype) != (was.shape, was.dtype):
        return False
    return now.device == was.device and now.stride() == was.stride()


def _put_back(bad: Tensor, values: Iterable[Tensor], before: Iterable[Tensor]) -> None:
    """``before`` into ``values`` where ``bad``, bit for bit."""
    for value, old in zip(values, before, strict=True):
        torch.where(bad, old, value, out=value)
