"""The moving average of the weights."""

import copy

import torch
from torch import nn

from distributed.wrapping import local


class ModelEma:
    """Exponential moving average of a model's weights.

    ``average = decay × average + (1 - decay) × weights`` after each update; with ``warmup`` the
    decay is at most (1 + t) / (10 + t) at update t, so that the random start is forgotten quickly.
    Buffers that aren't floating point (counters) are copied.

    Args:
        model: its weights start the average.
        decay: in [0, 1).
        warmup: whether the decay starts small.
        device: where the average lives; None is where the model lives.
        average: a copy of the model to use, if it is to be laid out in another way.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        *,
        warmup: bool = True,
        device: torch.device | None = None,
        average: nn.Module | None = None,
    ) -> None:
        self.decay = decay
        self.warmup = warmup
        self.module = (average or copy.deepcopy(model)).eval().requires_grad_(False)
        if device is not None:
            self.module.to(device)
        mine, theirs = (
            {k: local(v) for k, v in module.state_dict().items()} for module in (self.module, model)
        )
        self._pairs = [(mine[k], theirs[k]) for k in mine if mine[k].is_floating_point()]
        self._copied = [(mine[k], theirs[k]) for k in mine if not mine[k].is_floating_point()]

    def decay_at(self, update: int) -> float:
        """The decay at the ``update``-th step, counted from 0."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @torch.no_grad()
    def step(self, update: int) -> None:
        """Take the model's present weights into the average."""
        averages = [a for a, _ in self._pairs]
        weights = [w.to(a.device, a.dtype) for a, w in self._pairs]
        torch._foreach_lerp_(averages, weights, 1.0 - self.decay_at(update))
        for average, value in self._copied:
            average.copy_(value)
