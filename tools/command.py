"""What the commands of this folder share: errors as one line, progress, optional packages."""

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import TypeVar

from tqdm import tqdm

from errors import UserError

Item = TypeVar("Item")


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """The parser of ``python -m tools.NAME``; ``description`` may have several paragraphs."""
    return argparse.ArgumentParser(
        prog=f"python -m tools.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(
    command: Callable[[argparse.Namespace], int | None],
    arguments: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse ``argv``, carry out ``command``; returns the exit code (docs/reliability.md)."""
    try:
        return command(arguments.parse_args(argv)) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever reads the output (head, less) has seen enough.
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def require(module: str, package: str | None = None) -> ModuleType:
    """Import an optional ``module`` of ``package``. Raises UserError with the install command."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs {package or module} ({error}): pip install -r requirements-tools.txt"
        ) from None


def progress(items: Iterable[Item], what: str, *, total: int | None = None) -> Iterable[Item]:
    """``items`` with a bar on a terminal's standard error; silent elsewhere."""
    return tqdm(items, desc=what, total=total, leave=False, disable=None, file=sys.stderr)
