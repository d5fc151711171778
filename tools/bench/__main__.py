"""The command line of ``python -m tools.bench``."""

import sys
from collections.abc import Sequence

from tools.common import command

COMMANDS = {
    "loader": "photographs: a worker's share, and all of it on the host",
    "cache": "images from memory and from disk",
    "step": "a training step",
    "epoch": "a whole epoch, images included",
    "scaling": "several training processes",
    "attention": "a training step of CaiT, time and memory",
    "serve": "the service, against its model without HTTP",
    "scan": "finding the image files of a large set",
    "card": "all that needs a CUDA card: what .ci/gpu runs",
    "report": "write BENCHMARKS.md from the figures",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run_subcommand("bench", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
