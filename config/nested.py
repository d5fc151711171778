"""Config files whose options are nested, as other programs have them: what to write instead."""

from typing import Any

from config.declared import by_name, is_option, nearest_option, option_key
from config.yaml_reader import Entry
from errors import first_names, shortened, shown

# The sections of other programs by the option that is their name or type here.
_SECTIONS = {
    "model": ("model", "network", "net", "arch", "architecture", "backbone"),
    "opt": ("opt", "optim", "optimizer", "optimiser"),
    "sched": ("sched", "schedule", "scheduler", "lr-scheduler", "lr-config", "param-scheduler"),
    "data_set": ("data", "dataset", "data-set", "datasets", "dataloader", "train-dataloader"),
    "loss": ("loss", "criterion"),
    "model_ema": ("ema", "model-ema"),
}
_OWN_NAMES = ("name", "type", "policy", "value", "alpha", "kind", "enabled", "use")
# (the option of the section, key): what it is here.
_MEANT = {
    ("data_set", "root"): "data_path",
    ("data_set", "path"): "data_path",
    ("data_set", "dir"): "data_path",
    ("data_set", "data-root"): "data_path",
    ("data_set", "size"): "input_size",
    ("sched", "warmup"): "warmup_epochs",
    ("opt", "eps"): "opt_eps",
    ("opt", "betas"): "opt_betas",
    ("model_ema", "decay"): "model_ema_decay",
    ("model", "checkpoint"): "finetune",
    ("model", "dropout"): "drop",
}


def flat_instead(entry: Entry) -> str:
    """That options are flat, and what to write in place of an ``entry`` with others below it."""
    lines = [_flat(entry.key, inner) for inner in entry.inner[:5]]
    example = first_names(lines, 4)
    return f"options are flat, not nested below {shown(entry.key)}: write {example}"


def _flat(section: str, entry: Entry) -> str:
    """A line ``option: value``, or what is known of an option that there isn't."""
    key = option_key(entry.key)
    owner = next((o for o, names in _SECTIONS.items() if option_key(section) in names), "")
    if not owner and is_option(section):
        owner = by_name(section).name
    meant = _MEANT.get((owner, key))
    if meant is None and owner and key in _OWN_NAMES:
        meant = owner
    if meant is None and is_option(entry.key):
        meant = by_name(entry.key).name
    if meant is None:
        return f"{shortened(entry.key)} otherwise ({nearest_option(entry.key)})"
    return f"{meant}: {_value(entry.value)}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return "…" if isinstance(value, dict) else "null" if value is None else shortened(value)
