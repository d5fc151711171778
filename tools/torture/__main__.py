"""The command line of ``python -m tools.torture``."""

import sys
from collections.abc import Sequence

from tools.common import command

COMMANDS = {
    "kills": "kill training at random moments, resume it, compare",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run_subcommand("torture", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
