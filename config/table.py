"""Tables of options for the documents: all of them, and those of other programs beside them."""

import itertools
from collections.abc import Iterable

from config.declared import (
    Option,
    all_options,
    by_key,
    by_name,
    option_key,
    section_options,
    value_text,
)
from config.job import JobOptions
from config.peers import PeerOption, flags, peer_options
from config.resumed import ON_RESUME

# Values that say nothing.
EMPTY = (None, "", (), {})

INTRODUCTION = (
    "# Options",
    "",
    "Made from `config/options.py` by `python -m tools.docs`. Hyphens and underscores are the",
    "same, and every name is a YAML key.",
)


def options_table() -> str:
    """Every option in Markdown tables, one per section."""
    lines = list(INTRODUCTION)
    for title, members in itertools.groupby(all_options(), key=lambda opt: opt.title):
        lines += ["", f"## {title}", "", *_head("option", "values", "default", "meaning")]
        lines += [_row(f"`{o.flag}`", o.type_name, o.default_text, o.help) for o in members]
    return "\n".join(lines) + "\n"


def peer_table(peer: str, *, launcher: bool = False) -> str:
    """The options of another program, those of its launcher alone or without them, beside ours."""
    lines = _head("option", "default", "here", "default here", "difference")
    for opt in peer_options(peer):
        if opt.parsed and opt.launcher == launcher:
            lines.append(_row(*_beside(opt)))
    return "\n".join(lines) + "\n"


def resume_table() -> str:
    """What becomes of each option when a run goes on."""
    lines = _head("options", "", "that is")
    for rule in ON_RESUME:
        names = ", ".join(f"`{by_name(name).flag}`" for name in rule.options)
        lines.append(_row(names, rule.kind, rule.note))
    return "\n".join(lines) + "\n"


def option_here(opt: PeerOption) -> Option | None:
    """What another program's option is here; None where there is nothing like it."""
    found = (*(section_options(JobOptions, "launcher") if opt.launcher else ()), *all_options())
    return by_key(found).get(option_key(opt.here or opt.name))


def same_default(opt: PeerOption, here: Option) -> bool:
    """Whether the option starts from the same value there and here; all empty values are one."""
    return opt.default == here.default or (opt.default in EMPTY and here.default in EMPTY)


def _beside(opt: PeerOption) -> Iterable[str]:
    """The cells of a row."""
    there = ", ".join(f"`{flag}`" for flag in flags(opt))
    here = option_here(opt)
    if here is None:
        return there, _value(opt), "no", "", opt.why
    name = "same" if option_key(opt.name) == option_key(here.name) else f"`{here.flag}`"
    default = "same" if same_default(opt, here) else here.default_text or "nothing"
    return there, _value(opt), name, default, opt.why


def _value(opt: PeerOption) -> str:
    return "nothing" if opt.default in EMPTY else value_text(opt.default)


def _head(*cells: str) -> list[str]:
    return [_row(*cells), "|" + "---|" * len(cells)]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
