"""The command line of ``python -m tools.data``."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "explore": "counts, sizes, brightness, duplicates, damaged files: a page to look at",
    "split": "train, val and test as CSV files, from a folder of classes or a CSV file",
    "pack": "shards (tar files in webdataset's form) that train without many small files",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(f"tools.data.{argv[0]}").main(argv[1:])
    asked = argv[:1] in (["-h"], ["--help"])
    print("usage: python -m tools.data COMMAND …", file=sys.stdout if asked else sys.stderr)
    for name, what in COMMANDS.items():
        print(f"  {name:<8} {what}", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
