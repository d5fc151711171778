"""The command line of ``python -m tools.torture``."""

import sys
from collections.abc import Sequence

from tools.common import command

COMMANDS = {
    "kills": "kill training at random moments, resume it, compare",
    "flips": "flip bits and overwrite sectors of checkpoints, load them, compare",
    "images": "decode image files that mean harm, measure memory and time",
    "writes": "refuse every write of a training once, in turn",
    "cache": "kill processes that fill one disk cache, damage it, fill its disk: compare pixels",
    "locks": "start runs in one folder at the same moment, count who holds it",
    "ranks": "processes that disagree or freeze: who is named, and after how many seconds",
    "fuzz": "feed readers of files and texts with inputs that mean harm",
    "texts": "hostile configurations, tables and shards: seconds and memory of each",
    "clients": "hostile clients of the HTTP service: honest answers, memory, log, its end",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run_subcommand("torture", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
