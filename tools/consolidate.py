"""Make one file of a sharded checkpoint: ``python -m tools.consolidate FOLDER.shards FILE.pth``.

The file holds what the folder does, so a run can go on from it on any number of processes; with
``--weights`` only what inference needs.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bounded import size_text
from checkpointing.files import load_checkpoint, save_checkpoint, without_optimizer
from errors import CheckpointError
from outputs.console import say
from tools.common import command


def consolidate(folder: Path, file: Path, *, weights: bool = False) -> None:
    """Write the content of the checkpoint ``folder`` to ``file``.

    Raises CheckpointError if the folder can't be read, or the file is there already, and OSError.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not the folder of a sharded checkpoint")
    if file.exists():
        raise CheckpointError(f"{file} exists: remove it, or name another")
    content = load_checkpoint(folder)
    save_checkpoint(file, without_optimizer(content) if weights else content)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.consolidate", description=__doc__.partition(":")[0]
    )
    parser.add_argument("folder", type=Path, help="checkpoint-….shards")
    parser.add_argument("file", type=Path, help="the .pth file to write")
    parser.add_argument("--weights", action="store_true", help="without the optimiser")
    return command.run(_run, parser, argv)


def _run(arguments: argparse.Namespace) -> None:
    consolidate(arguments.folder, arguments.file, weights=arguments.weights)
    say(f"{arguments.file}: {size_text(arguments.file.stat().st_size)}")


if __name__ == "__main__":
    sys.exit(main())
