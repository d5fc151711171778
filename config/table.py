"""The page of all options, ``docs/options.md``."""

import itertools

from config.declared import Option, all_options

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
        lines += ["", f"## {title}", ""]
        lines += ["| option | values | default | meaning |", "|---|---|---|---|"]
        lines += [_row(opt) for opt in members]
    return "\n".join(lines) + "\n"


def _row(opt: Option) -> str:
    cells = (f"`{opt.flag}`", opt.type_name, opt.default_text, opt.help)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
