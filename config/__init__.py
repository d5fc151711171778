"""Every option of a run: declared once, then from the command line and YAML to a ``Config``.

- ``options``: the declared options, and how to add one
- ``declared``: an option's record, and how to find it by its name
- ``convert``: values from texts
- ``background``: the colour under transparent images
- ``parser``: the command line
- ``keywords``: NAME=VALUE words
- ``files``: YAML; ``yaml_reader``, its text as it is spelled; ``nested``, what to write instead
- ``rules``: impossible combinations; ``augmentation_rules``, those of augmentation
- ``metrics``: what ``--best-metric`` may name
- ``resumed``: what becomes of each option when a run goes on
- ``config``: the resolved options of a run
- ``peers``: the options of other programs, and what they are here
- ``train_sizes``: the sizes of training images by epoch
- ``table``: the page of all options
- ``job``: the options of a SLURM job

Nothing in this package imports torch, so that ``--help`` answers at once.
"""

from config.augmentation_rules import jitters, one_by_one
from config.background import DROP, background_colour
from config.config import (
    CHECKPOINT,
    COMMAND_LINE,
    DEFAULT,
    FITTED,
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
    value_text,
)
from config.files import read_yaml, to_yaml
from config.keywords import KEYWORD_OPTIONS, keywords
from config.multilabel import is_multilabel
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
from config.resumed import ON_RESUME, OnResume, on_resume
from config.rules import conflicts, optimizer_name, unused
from config.table import option_here, options_table, peer_table, resume_table, same_default
from config.train_sizes import stages, train_size
from config.yaml_reader import read_entries

__all__ = [
    "CHECKPOINT",
    "COMMAND_LINE",
    "DEFAULT",
    "FITTED",
    "DROP",
    "KEYWORD_OPTIONS",
    "MODEL",
    "ON_RESUME",
    "PEERS",
    "AugmentOptions",
    "Config",
    "DataOptions",
    "DistOptions",
    "EmaOptions",
    "LogOptions",
    "LossOptions",
    "ModelOptions",
    "OnResume",
    "OptimOptions",
    "Option",
    "Parser",
    "PeerOption",
    "RunOptions",
    "SaveOptions",
    "ScheduleOptions",
    "all_options",
    "background_colour",
    "by_name",
    "conflicts",
    "convert",
    "from_flat",
    "get_parser",
    "is_multilabel",
    "is_option",
    "jitters",
    "keywords",
    "load",
    "nearest_option",
    "on_resume",
    "one_by_one",
    "option",
    "option_here",
    "optimizer_name",
    "options_table",
    "peer_options",
    "peer_table",
    "read_entries",
    "read_yaml",
    "resolve",
    "resume_table",
    "same_default",
    "section_options",
    "stages",
    "to_yaml",
    "train_size",
    "unused",
    "value_text",
]
