"""What the commands of this folder share: errors as one line, a run's options, progress, optional
packages."""

import argparse
import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from tqdm import tqdm

import main
from config import Config
from errors import Stopped, UserError, did_you_mean, os_errors_in_words
from outputs.console import console, output_lost, say
from outputs.files import reason

Item = TypeVar("Item")


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """The parser of ``python -m tools.NAME``; ``description`` may have several paragraphs."""
    return argparse.ArgumentParser(
        prog=f"python -m tools.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class RunParser(argparse.ArgumentParser):
    """A tool's own options; all others are those of ``main.py``, resolved as ``config``."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, rest = self.parse_known_args(args, namespace)
        known.config = main.load_config(rest)
        return known


def run_parser(name: str, description: str) -> RunParser:
    """The parser of a tool that is told of a run as ``main.py`` is.

    A tool's own options must not have the name of an option of the configuration.
    """
    return RunParser(
        prog=f"python -m tools.{name}",
        description=description,
        epilog="All options of main.py are taken too, --config as well: docs/options.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def positive(text: str) -> int:
    """A whole number above zero, as argparse's type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


def run_subcommand(
    name: str, subcommands: Mapping[str, str], argv: Sequence[str] | None = None
) -> int:
    """Run ``python -m tools.NAME SUBCOMMAND …``, the ``main`` of a module of that package.

    Args:
        name: the package ``tools.NAME``.
        subcommands: names of its modules, and what each does.
        argv: the command line's arguments; None: this process's.

    Returns:
        The exit code.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    with console():
        return _run_subcommand(name, subcommands, argv)


def _run_subcommand(name: str, subcommands: Mapping[str, str], argv: list[str]) -> int:
    if argv and argv[0] in subcommands:
        return importlib.import_module(f"tools.{name}.{argv[0]}").main(argv[1:])
    helps = argv[:1] in (["-h"], ["--help"])
    out = sys.stdout if helps else sys.stderr
    if argv and not helps:
        hint = did_you_mean(argv[0], subcommands)
        print(f"error: unknown command {argv[0]!r}{hint and f'; {hint}'}", file=out)
    print(f"usage: python -m tools.{name} COMMAND …", file=out)
    width = max(map(len, subcommands))
    for subcommand, what in subcommands.items():
        print(f"  {subcommand:<{width + 1}} {what}", file=out)
    return 0 if helps else 2


def run(
    command: Callable[[argparse.Namespace], int | None],
    arguments: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    *,
    reader_ends: bool = False,
) -> int:
    """Parse ``argv``, carry out ``command``; returns the exit code (docs/reliability.md), 1 where
    with ``reader_ends`` a part of the output could not be written.

    With ``reader_ends`` a command whose output nobody reads any more (``| head``) ends well at
    once; any other goes on to its end.
    """
    with console(reader_ends=reader_ends):
        try:
            with os_errors_in_words():
                parsed = arguments.parse_args(argv)
                with _asked_only(parsed):
                    code = command(parsed) or 0
                # All that such a tool makes is what it prints.
                return code or int(reader_ends and output_lost())
        except UserError as error:
            say(f"error: {error}", error=True)
            return error.exit_code
        except BrokenPipeError:
            return 0
        except Stopped as stopped:
            say(str(stopped), error=True)
            return stopped.exit_code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise Stopped, so that what is half done is removed, as after
    Ctrl-C. In another thread than the main one they stay what they were."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup has SIGHUP ignored
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _asked_only(parsed: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    config = getattr(parsed, "config", None)
    if not isinstance(config, Config) or not config.run.resume:
        return contextlib.nullcontext()
    from training.asked import asked_only

    return asked_only(config)


def require(module: str, package: str | None = None) -> ModuleType:
    """Import an optional ``module`` of ``package``. Raises UserError with the install command."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs {package or module} ({error}): pip install -r requirements-tools.txt"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write ``text``, whole, into a folder that is made if need be. Raises UserError."""
    import utils  # brings torch, which --help needn't wait for

    with _into_a_folder(path):
        utils.write_text(path, text)


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, in a folder that is made if need be; ``path`` is there once
    it is whole. Raises UserError for what can't be written.
    """
    import utils  # brings torch, which --help needn't wait for

    with _into_a_folder(path), utils.written_whole(path) as temporary:
        yield temporary


@contextlib.contextmanager
def _into_a_folder(path: Path) -> Iterator[None]:
    """Inside, ``path`` is written, in a folder that is made. Raises UserError where it can't be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise not_written(path, error) from None


def not_written(path: Path, error: OSError) -> UserError:
    """What to raise where ``path`` can't be written."""
    return UserError(f"not written: {reason(error, path)}")


def progress(items: Iterable[Item], what: str, *, total: int | None = None) -> Iterable[Item]:
    """``items`` with a bar on a terminal's standard error; silent elsewhere."""
    return tqdm(items, desc=what, total=total, leave=False, disable=None, file=sys.stderr)
