"""The flags of a program, in groups, from its options."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cluster.errors import UsageError
from cluster.options import Option, section_name

if TYPE_CHECKING:
    from collections.abc import Sequence


POSITIONAL_DEST = "positional argument"


class _Parser(argparse.ArgumentParser):
    """argparse, raising the typed error instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}")


def build_parser(
    program: str,
    options: Sequence[Option],
    *,
    positional: str | None = None,
    description: str | None = None,
    show_advanced: bool = False,
) -> argparse.ArgumentParser:
    """The parser of a program: one group of flags for each section or named group."""
    named = next((o for o in options if o.name == positional), None)
    width = min(shutil.get_terminal_size().columns - 2, 110)
    parser = _Parser(
        prog=program,
        usage=f"{program}{_usage_of(named)} [options]",
        description=description,
        epilog=_other_ways(options),
        formatter_class=lambda prog: argparse.HelpFormatter(
            prog, max_help_position=34, width=width
        ),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    _add_general_flags(parser, hides_some=any(o.advanced for o in options))
    if named is not None:
        parser.add_argument_group("Argument").add_argument(
            POSITIONAL_DEST,
            nargs="*" if named.is_list else "?",
            metavar=named.name.upper(),
            help=_help_text(named),
        )
    _add_options(parser, options, positional, show_advanced=show_advanced)
    return parser


def _other_ways(options: Sequence[Option]) -> str:
    """The same of every program, so that it need not stand beside each option. The example is a
    secret where there is one, as nobody writes these as flags."""
    example = next((each for each in options if each.secret), options[0])
    return (
        f"Every option is also an environment variable, {example.flag} as {example.variable}, and "
        "a key of the file of --config. A flag beats a variable, a variable the file."
    ).replace("%", "%%")


def _usage_of(positional: Option | None) -> str:
    if positional is None:
        return ""
    name = positional.name.upper() + (" ..." if positional.is_list else "")
    return f" {name}" if positional.is_required else f" [{name}]"


def _add_options(
    parser: argparse.ArgumentParser,
    options: Sequence[Option],
    positional: str | None,
    *,
    show_advanced: bool,
) -> None:
    groups: dict[str, Any] = {}
    for each in options:
        title = each.group or section_name(each.section).replace("_", " ").capitalize()
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        shown = _help_text(each) if show_advanced or not each.advanced else argparse.SUPPRESS
        if each.name == positional:
            shown = f"The same as {each.name.upper()}."
        _add_flag(groups[title], each, shown)


def _add_general_flags(parser: argparse.ArgumentParser, *, hides_some: bool) -> None:
    general = parser.add_argument_group("General")
    general.add_argument("-h", "--help", action="help", help="Show this and exit.")
    general.add_argument(
        "--help-all",
        action="help",
        help="Show the advanced options too." if hides_some else argparse.SUPPRESS,
    )
    general.add_argument(
        "--config", metavar="FILE", help="YAML file with any of these options, flat or by section."
    )
    general.add_argument(
        "--show-config",
        action="store_true",
        help="Print each value with where it came from, and exit.",
    )


def _add_flag(group: Any, each: Option, help_text: str) -> None:
    names = [each.flag] if each.short is None else [each.short, each.flag]
    how: dict[str, Any] = {}
    if each.is_bool:
        how["action"] = argparse.BooleanOptionalAction
    else:
        how["metavar"] = _metavar(each)
        if each.is_list:
            how |= {"nargs": "+", "action": "extend"}
    group.add_argument(*names, dest=each.name, help=help_text, **how)
    for alias in each.aliases:
        group.add_argument(alias, dest=each.name, help=argparse.SUPPRESS, **how)


def _metavar(each: Option) -> str:
    if each.metavar is not None:
        return each.metavar
    if each.allowed is not None:
        return "{" + ",".join(str(value) for value in each.allowed) + "}"
    named = {int: "N", float: "X", Path: "PATH", str: "TEXT"}
    return named.get(each.element_type, "VALUE")


def _help_text(each: Option) -> str:
    text = each.help
    if each.is_required:
        text += " [required]"
    elif each.default not in (None, (), "") and "Default:" not in text:
        shown = each.default
        if each.is_list:
            shown = " ".join(str(item) for item in each.default)
        elif each.is_bool:
            shown = "on" if each.default else "off"
        text += f" [default: {shown}]"
    return text.replace("%", "%%")
