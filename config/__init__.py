"""Every option of a run: declared once, then from the command line and YAML to a ``Config``.

- ``options``: the declared options, and how to add one
- ``declared``: an option's record, and how to find it by its name
- ``convert``: values from texts
- ``parser``: the command line
- ``files``: YAML
- ``rules``: impossible combinations
- ``config``: the resolved options of a run
- ``table``: the page of all options
- ``job``: the options of a SLURM job

Nothing in this package imports torch, so that ``--help`` answers at once.
"""

from config.config import CHECKPOINT, COMMAND_LINE, DEFAULT, Config, from_flat, load, resolve
from config.convert import convert
from config.declared import (
    Option,
    all_options,
    by_name,
    is_option,
    nearest_option,
    section_options,
)
from config.files import read_yaml, to_yaml
from config.options import (
    AugmentOptions,
    DataOptions,
    DistOptions,
    EmaOptions,
    LogOptions,
    LossOptions,
    ModelOptions,
    OptimOptions,
    RunOptions,
    SaveOptions,
    ScheduleOptions,
    option,
)
from config.parser import Parser, get_parser
from config.rules import conflicts, unused
from config.table import options_table

__all__ = [
    "CHECKPOINT",
    "COMMAND_LINE",
    "DEFAULT",
    "AugmentOptions",
    "Config",
    "DataOptions",
    "DistOptions",
    "EmaOptions",
    "LogOptions",
    "LossOptions",
    "ModelOptions",
    "OptimOptions",
    "Option",
    "Parser",
    "RunOptions",
    "SaveOptions",
    "ScheduleOptions",
    "all_options",
    "by_name",
    "conflicts",
    "convert",
    "from_flat",
    "get_parser",
    "is_option",
    "load",
    "nearest_option",
    "option",
    "options_table",
    "read_yaml",
    "resolve",
    "section_options",
    "to_yaml",
    "unused",
]
