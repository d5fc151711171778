"""What a model differs in from the one of its name: arguments, pooling, constants of batch norm."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from errors import OptionError


@dataclass(frozen=True)
class Variant:
    """The options that a model is built with besides its name; the defaults change nothing."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    """``--model-kwargs``, by the names that the model's class or function knows."""
    global_pool: str = ""
    """``--global-pool``; empty: the model's own."""
    bn_momentum: float | None = None
    """Share of a batch in the running statistics of batch norm; None: the model's own."""
    bn_eps: float | None = None
    """What batch norm adds to the variance; None: the model's own."""

    @property
    def keywords(self) -> dict[str, Any]:
        """All arguments, pooling included."""
        pool = {"global_pool": self.global_pool} if self.global_pool else {}
        return {**self.arguments, **pool}

    def option_of(self, keyword: str) -> str:
        """The option that a keyword came with."""
        return "model_kwargs" if keyword in self.arguments else keyword

    def set_batch_norm(self, model: nn.Module, name: str) -> None:
        """Set both constants in every batch norm of ``model``.

        Raises OptionError where one is asked for and there is no batch norm.
        """
        values = {"momentum": self.bn_momentum, "eps": self.bn_eps}
        values = {constant: value for constant, value in values.items() if value is not None}
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)] if values else []
        for constant, value in values.items():
            if not norms:
                raise OptionError(f"bn_{constant}", f"{name} has no batch norm: leave it out")
            for norm in norms:
                setattr(norm, constant, value)


PLAIN = Variant()
"""A model as its name says."""
