"""Keyword arguments of models and optimisers, given as ``NAME=VALUE`` words.

A value is what Python or YAML would make of it: numbers, true and false, lists, text.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from errors import OptionError, shown

if TYPE_CHECKING:
    from config.config import Config

KEYWORD_OPTIONS = ("model_kwargs", "opt_kwargs")
MOST_PAIRS = 100
_WORDS = {"true": True, "false": False, "none": None, "null": None}
# Arguments that options of their own decide, and those options; "" where the run decides.
_TAKEN = {
    "model_kwargs": {
        "img_size": "--input-size",
        "image_size": "--input-size",
        "in_chans": "--in-chans",
        "global_pool": "--global-pool",
        "drop_rate": "--drop",
        "drop_path_rate": "--drop-path",
        "drop_block_rate": "--drop-block",
        "pretrained": "--pretrained",
        "weights": "--pretrained",
        "checkpoint_path": "--finetune",
        "bn_momentum": "--bn-momentum",
        "bn_eps": "--bn-eps",
        **dict.fromkeys(
            ("num_classes", "num_labels", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),
            "",
        ),
        **dict.fromkeys(("features_only", "out_indices", "scriptable", "exportable"), ""),
    },
    "opt_kwargs": {
        "lr": "--lr",
        "opt": "--opt",
        "weight_decay": "--weight-decay",
        "momentum": "--momentum",
        "eps": "--opt-eps",
        "betas": "--opt-betas",
        **dict.fromkeys(("params", "foreach", "fused", "capturable", "differentiable"), ""),
    },
}


def keywords(option: str, pairs: Sequence[str]) -> dict[str, Any]:
    """The arguments that the words of ``option`` name.

    Raises OptionError for a word that is no ``NAME=VALUE``, a name given twice, and one that
    another option decides.
    """
    if len(pairs) > MOST_PAIRS:
        raise OptionError(option, f"has {len(pairs):,} words: {MOST_PAIRS} at most")
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip()
        if not (equals and name.isidentifier()):
            raise OptionError(option, f"{shown(pair)} is not NAME=VALUE, e.g. depth=4")
        if name in found:
            raise OptionError(option, f"{name} is there twice")
        if name in _TAKEN[option]:
            instead = _TAKEN[option][name]
            hint = f"use {instead}" if instead else "leave it out, the run decides it"
            raise OptionError(option, f"{name}: {hint}")
        found[name] = _value(text.strip())
    return found


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def as_pairs(values: Mapping[str, Any]) -> list[str]:
    """The words of a YAML mapping, whose values are spelled as in the file."""
    return [f"{name}={_spelled(value)}" for name, value in values.items()]


def _spelled(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return str(value)


def _literal(value: Any) -> str:
    """A value inside of another one, which must be Python's to be read again."""
    if isinstance(value, str):
        return repr(_value(value))
    return _spelled(value)


def keyword_conflicts(config: "Config") -> Iterator[OptionError]:
    """Words of the keyword options that can't be read."""
    values = {"model_kwargs": config.model.model_kwargs, "opt_kwargs": config.optim.opt_kwargs}
    for option, pairs in values.items():
        try:
            keywords(option, pairs)
        except OptionError as error:
            yield error
