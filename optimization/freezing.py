"""Which parameters are trained, and when."""

import math
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from errors import OptionError, did_you_mean, first_names
from optimization.groups import classifier_parameters, matches


class Freezer:
    """Which parameters are trained in which epoch.

    A pattern is a glob on parameter names or the name of a module: ``blocks.3``, ``head``,
    ``*.norm1.*``. ``attn_only`` trains attention, the classifier and the position embedding
    (Touvron et al., "Three things everyone should know about Vision Transformers", 2022, §4).

    Args:
        model: the bare module. What it keeps fixed itself stays fixed.
        freeze: patterns of what is kept fixed.
        unfreeze_at: ``EPOCHS:PATTERN``, what is trained once that many epochs are done.
        attn_only: in place of ``freeze``.

    Raises:
        OptionError: a pattern that matches nothing, a model without attention, or nothing left to
            train.
    """

    def __init__(
        self,
        model: nn.Module,
        freeze: Sequence[str] = (),
        unfreeze_at: Sequence[str] = (),
        attn_only: bool = False,
    ) -> None:
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        names = list(self._parameters)
        frozen: set[str] = set()
        if attn_only:
            frozen = set(names) - _attention_names(model, names)
        for pattern in freeze:
            frozen |= _matching(pattern, names, "freeze", "parameter")
        # The epoch from which a parameter is trained; infinity for those that stay fixed.
        self._from = {name: math.inf if name in frozen else 0.0 for name in names}
        for rule in unfreeze_at:
            epoch, _, pattern = rule.partition(":")
            for name in _matching(pattern, sorted(frozen), "unfreeze_at", "frozen parameter"):
                self._from[name] = min(self._from[name], int(epoch))
        if all(epoch > 0 for epoch in self._from.values()):
            raise OptionError(
                "freeze", "leaves nothing to train in the first epoch: free some part"
            )

    def apply(self, epoch: int) -> bool:
        """Set ``requires_grad`` as it is after ``epoch`` epochs; returns whether any changed.

        Depends on the epoch only. Gradients of what becomes fixed are dropped.
        """
        changed = False
        for name, parameter in self._parameters.items():
            trained = epoch >= self._from[name]
            changed |= parameter.requires_grad != trained
            parameter.requires_grad_(trained)
            if not trained:
                parameter.grad = None
        return changed


def _attention_names(model: nn.Module, names: Sequence[str]) -> set[str]:
    attention = {name for name in names if ".attn." in name}
    if not attention:
        raise OptionError("attn_only", "the model has no attention: leave it out or use --freeze")
    head = {id(p) for p in classifier_parameters(model)}
    rest = {n for n, p in model.named_parameters() if id(p) in head or n == "pos_embed"}
    return attention | rest & set(names)


def _matching(pattern: str, names: Sequence[str], option: str, kind: str) -> set[str]:
    """The names that ``pattern`` stands for, at least one."""
    found = {name for name in names if matches(name, [pattern])}
    if not found:
        modules = list(dict.fromkeys(n.rpartition(".")[0] or n for n in names))
        examples = f"there is {first_names(modules, 3) or 'none'}"
        known = [*names, *modules]
        hint = did_you_mean(pattern, known, most=3, cutoff=0.5, otherwise=examples)
        if Path(pattern).exists():
            # A shell makes names of files of a bare *.
            hint += "; a pattern with * must be quoted"
        raise OptionError(option, f"{pattern!r} matches no {kind}; {hint}")
    return found


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """Norms with running statistics all of whose parameters are fixed.

    In training they belong in evaluation mode: else their statistics go on moving.
    """
    found = []
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        fixed = parameters and not any(p.requires_grad for p in parameters)
        if getattr(module, "running_mean", None) is not None and fixed:
            found.append(module)
    return found


def set_mode(net: nn.Module, model: nn.Module, train_mode: bool = True) -> None:
    """Training mode, but for batch norms that are frozen: those keep their statistics too."""
    net.train(train_mode)
    for norm in frozen_norms(model):
        norm.eval()
