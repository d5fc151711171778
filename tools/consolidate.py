"""Make one file of a sharded checkpoint: ``python -m tools.consolidate FOLDER.shards FILE.pth``.

The file holds what the folder does, so a run can go on from it on any number of processes; with
``--weights`` only what inference needs.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpointing.files import load_checkpoint, save_checkpoint, without_optimizer
from errors import CheckpointError, UserError


def consolidate(folder: Path, file: Path, *, weights: bool = False) -> None:
    """Write the content of the checkpoint ``folder`` to ``file``.

    Raises CheckpointError if the folder can't be read, or the file is there already.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not the folder of a sharded checkpoint")
    if file.exists():
        raise CheckpointError(f"{file} exists: remove it, or name another")
    content = load_checkpoint(folder)
    try:
        save_checkpoint(file, without_optimizer(content) if weights else content)
    except OSError as error:
        raise CheckpointError(f"{file} can't be written: {error.strerror}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.consolidate", description=__doc__.partition(":")[0]
    )
    parser.add_argument("folder", type=Path, help="checkpoint-….shards")
    parser.add_argument("file", type=Path, help="the .pth file to write")
    parser.add_argument("--weights", action="store_true", help="without the optimiser")
    arguments = parser.parse_args(argv)
    try:
        consolidate(arguments.folder, arguments.file, weights=arguments.weights)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments.file}: {arguments.file.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
