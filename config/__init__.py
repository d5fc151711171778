"""Every option of a run: declared once, then from the command line and YAML to a ``Config``.

- ``options``: the declared options, and how to add one
- ``declared``: an option's record, and how to find it by its name
- ``convert``: values from texts
- ``parser``: the command line
- ``files``: YAML
- ``rules``: impossible combinations
- ``config``: the resolved options of a run
- ``peers``: the options of other programs, and what they are here
- ``table``: the page of all options
- ``job``: the options of a SLURM job

Nothing in this package imports torch, so that ``--help`` answers at once.
"""

from config.config import (
    CHECKPOINT,
    COMMAND_LINE,
    DEFAULT,
    MODEL,
    Config,
    from_flat,
    load,
    resolve,
)
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
from config.peers import PEERS, PeerOption, peer_options
from config.rules import conflicts, optimizer_name, unused
from config.table import option_here, options_table, peer_table, same_default

__all__ = [
    "CHECKPOINT",
    "COMMAND_LINE",
    "DEFAULT",
    "MODEL",
    "PEERS",
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
    "PeerOption",
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
    "option_here",
    "optimizer_name",
    "options_table",
    "peer_options",
    "peer_table",
    "read_yaml",
    "resolve",
    "same_default",
    "section_options",
    "to_yaml",
    "unused",
]
