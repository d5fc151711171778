"""The command line, made from the declared options."""

import argparse
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from config.convert import convert
from config.declared import UNIONS, Option, all_options, by_key, nearest_of, option_key
from errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and option names in which ``-`` and ``_`` are the same."""

    known: Mapping[str, Option] = types.MappingProxyType({})
    """The options that it takes, as of :func:`config.declared.by_key`."""

    def error(self, message: str) -> typing.NoReturn:
        """Raise UserError, where argparse prints the usage and exits."""
        raise UserError(message)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's. Raises UserError that names the nearest option for an unknown one."""
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [arg for arg in unknown if arg.startswith("-")]
            if not flags:
                raise UserError(f"unexpected argument {unknown[0]!r}; options start with --")
            flag = flags[0].split("=")[0]
            raise UserError(f"unknown option {flag}; {self._instead_of(flag)}")
        return known

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's; every spelling of an option's name is understood."""
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._normalise(arg) for arg in args], namespace)

    def _instead_of(self, flag: str) -> str:
        """What to write in place of an unknown option."""
        parts = flag.removeprefix("--").split("--")
        if len(parts) > 1 and all(option_key(part) in self.known for part in parts):
            return f"a space is missing: {' '.join(f'--{part}' for part in parts)}"
        return nearest_of(flag.lstrip("-"), self.known)

    def _normalise(self, arg: str) -> str:
        if not arg.startswith("--"):
            return arg
        name, equals, value = arg[2:].partition("=")
        key = option_key(name)
        if key in self.known:
            return self.known[key].flag + equals + value
        if key.startswith("no-") and key[3:] in self.known:
            return "--no-" + self.known[key[3:]].flag[2:] + equals + value
        return arg


def get_parser(defaults: bool = True, launcher: Sequence[Option] = ()) -> Parser:
    """The command line. With ``defaults=False`` the namespace holds only what was given.

    ``launcher``: options that a launcher takes before those of the run.
    """
    parser = Parser(
        prog="main.py",
        usage="main.py [--config FILE.yaml] [--OPTION VALUE …]",
        description="Train and evaluate image classifiers: DeiT, CaiT, ResNet and any timm model.",
        epilog="Examples: main.py --model deit_small --data-path pets; main.py --config "
        "configs/quickstart.yaml --epochs 5; main.py --eval --resume output/run/best.pth",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
        allow_abbrev=False,
    )
    found = (*launcher, *all_options())
    parser.known = by_key(found)
    groups: dict[str, Any] = {}
    for opt in found:
        if opt.section not in groups:
            groups[opt.section] = parser.add_argument_group(opt.title)
        default = opt.default if defaults else argparse.SUPPRESS
        groups[opt.section].add_argument(
            opt.flag, dest=opt.name, help=_help(opt), default=default, **_reading(opt)
        )
    return parser


def _help(opt: Option) -> str:
    shown = opt.default is not None and opt.default_text and not opt.transient
    default = f" (default: {opt.default_text})" if shown and "default" not in opt.help else ""
    return opt.help.replace("%", "%%") + default


def _reading(opt: Option) -> dict[str, Any]:
    """How argparse reads the words after the option's flag."""
    if opt.type in (bool, bool | None):
        return {"action": argparse.BooleanOptionalAction}
    metavar = opt.type_name.replace(" …", "")
    if _is_tuple(opt.type):
        return {"action": _StoreTuple, "opt": opt, "nargs": "+", "metavar": metavar}
    return {"type": partial(convert, opt), "metavar": metavar}


def _is_tuple(tp: Any) -> bool:
    members = typing.get_args(tp) if typing.get_origin(tp) in UNIONS else (tp,)
    return any(typing.get_origin(member) is tuple for member in members)


class _StoreTuple(argparse.Action):
    def __init__(self, *, opt: Option, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.opt = opt

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        # One word may hold several values, "0.2,1".
        raw = values[0] if len(values) == 1 else values
        setattr(namespace, self.dest, convert(self.opt, raw))
