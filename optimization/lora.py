"""Low-rank adapters (LoRA): large models fine-tuned by few parameters.

"LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al. 2021, arXiv:2106.09685): beside a
fixed W of a linear layer, B A of rank r is learnt, with B = 0 at first; peft makes the layers.
"""

import logging
import re
from fnmatch import fnmatchcase

from torch import nn

from architectures.tracing import traced
from cait_models import Attention_talking_head
from config import ModelOptions
from errors import OptionError, did_you_mean, first_names
from optimization.groups import classifier_parameters

log = logging.getLogger(__name__)

# They are a few numbers, which a kernel may read without calling the layer.
_MIX_HEADS = ("proj_l", "proj_w")


def add_adapters(model: nn.Module, options: ModelOptions) -> None:
    """Give layers of ``model`` adapters, in place, and fix all but them and the classifier.

    Layers are those that ``lora_targets`` match, else all linear ones but the classifier's. The
    first matrices of the adapters are drawn from torch's generator.

    Raises:
        OptionError: peft isn't there, a pattern matches no layer that can have an adapter, or the
            model has none.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise OptionError("lora", f"needs peft ({error}): pip install peft") from None
    chosen = _chosen(model, options)
    alpha = options.lora if options.lora_alpha is None else options.lora_alpha
    values = {"r": options.lora, "lora_alpha": alpha, "bias": "none"}
    # A list would match the ends of names too.
    names = "|".join(map(re.escape, chosen))
    inject_adapter_in_model(LoraConfig(target_modules=names, **values), model)
    head = {id(p) for p in classifier_parameters(model)}
    trained = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or id(parameter) in head)
        trained += parameter.numel() if parameter.requires_grad else 0
    total = sum(p.numel() for p in model.parameters())
    log.info(
        "LoRA     rank %d, alpha %g, in %d layers (%s): %s of %s parameters are trained (%.2f %%)",
        options.lora,
        alpha,
        len(chosen),
        first_names(sorted({name.rpartition(".")[2] for name in chosen}), 6),
        f"{trained:,}",
        f"{total:,}",
        100 * trained / total,
    )


def _chosen(model: nn.Module, options: ModelOptions) -> list[str]:
    """The names of the layers that get adapters."""
    possible = _possible(model, options)
    if not possible:
        raise OptionError("lora", "the model has no linear layers but its head: use --freeze")
    if not options.lora_targets:
        return possible
    found: set[str] = set()
    for pattern in options.lora_targets:
        matching = {name for name in possible if _matches(name, pattern)}
        if not matching:
            known = [*possible, *dict.fromkeys(name.rpartition(".")[2] for name in possible)]
            hint = did_you_mean(
                pattern, known, most=3, cutoff=0.5, otherwise=f"there is {first_names(possible, 3)}"
            )
            raise OptionError("lora_targets", f"{pattern!r} matches no linear layer; {hint}")
        found |= matching
    return [name for name in possible if name in found]


def _matches(name: str, pattern: str) -> bool:
    """A glob, a layer's name, its last part, or the name of what holds it."""
    ends = name.endswith("." + pattern) or name.startswith(pattern + ".")
    return ends or fnmatchcase(name, pattern)


def _possible(model: nn.Module, options: ModelOptions) -> list[str]:
    """Linear layers that the forward pass calls, without the classifier's."""
    head = {id(p) for p in classifier_parameters(model)}
    called = traced(model, options.input_size)[1]
    mixing = {
        id(getattr(module, part))
        for module in model.modules()
        if isinstance(module, Attention_talking_head)
        for part in _MIX_HEADS
    }
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and name in called
        and id(module) not in mixing
        and id(module.weight) not in head
    ]
