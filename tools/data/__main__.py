"""The command line of ``python -m tools.data``."""

import sys
from collections.abc import Sequence

from tools.common import command

COMMANDS = {
    "explore": "counts, sizes, brightness, duplicates, damaged files: a page to look at",
    "show": "a sheet of training images as the model sees them, several draws of each",
    "split": "train, val and test as CSV files, from a folder of classes or a CSV file",
    "pack": "shards (tar files in webdataset's form) that train without many small files",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run_subcommand("data", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
