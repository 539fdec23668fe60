"""Where option values come from: the command line, the environment, one YAML file.

Each reader returns raw values by option name, and where each was said, in words for people.
Nothing is converted here: `cluster/config.py` validates all sources by the same rules.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from cluster.config_flags import POSITIONAL_DEST, build_parser
from cluster.config_validation import REDACTED, clipped
from cluster.errors import ConfigError, UsageError
from cluster.options import Option, flag_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

CONFIG_VARIABLE = "BATON_CONFIG"


@dataclass(slots=True)
class Source:
    """Raw values by option name, and the words that say where each stands."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CommandLine:
    source: Source
    config_path: str | None
    show_config: bool


def read_command_line(
    program: str,
    options: Sequence[Option],
    argv: Sequence[str],
    *,
    positional: str | None,
    description: str | None,
) -> CommandLine:
    """Flags of `argv`. `--help` and `--help-all` print and leave with `SystemExit(0)`."""
    parser = build_parser(
        program,
        options,
        positional=positional,
        description=description,
        show_advanced="--help-all" in argv,
    )
    found, unknown = parser.parse_known_args(list(argv))
    if unknown:
        _refuse_unknown(program, unknown, options)
    values = vars(found)
    config_path = values.pop("config", None)
    show_config = values.pop("show_config", False)
    source = Source()
    given = values.pop(POSITIONAL_DEST, None)
    for name, value in values.items():
        source.values[name] = value
        source.origins[name] = f"flag {flag_of(name)}"
    if given is not None and positional is not None:
        if positional in source.values:
            raise UsageError(
                f"{program}: {positional.upper()} is given twice, as an argument and as "
                f"{flag_of(positional)}."
            )
        source.values[positional] = given
        source.origins[positional] = f"argument {positional.upper()}"
    return CommandLine(source, config_path, show_config)


def _refuse_unknown(program: str, unknown: Sequence[str], options: Sequence[Option]) -> NoReturn:
    first = next((word for word in unknown if word.startswith("-")), unknown[0])
    first = first.partition("=")[0]
    if not first.startswith("-"):
        raise UsageError(f"{program}: unexpected argument {first!r}.")
    flags = [o.flag for o in options]
    flags += [f"--no-{o.flag[2:]}" for o in options if o.is_bool]
    hint = _suggestion(first, flags) or f" `{program} --help-all` lists them all."
    raise UsageError(f"{program}: unknown flag {first}.{hint}")


def _suggestion(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f" Did you mean {close[0]}?" if close else ""


def read_environment(options: Sequence[Option], env: Mapping[str, str]) -> Source:
    """`BATON_<FLAG>` variables. An empty one counts as unset; lists are `a,b` or JSON."""
    source = Source()
    for each in options:
        text = env.get(each.variable, "")
        if text == "":
            continue
        origin = f"environment {each.variable}"
        source.values[each.name] = _split_list(text, each, origin) if each.is_list else text
        source.origins[each.name] = origin
    return source


def _split_list(text: str, each: Option, origin: str) -> list[Any]:
    if not text.lstrip().startswith("["):
        return [item.strip() for item in text.split(",") if item.strip()]
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        shown = REDACTED if each.secret else clipped(repr(text))
        raise ConfigError(f"{each.flag}: not a JSON list: {shown} ({origin}).") from None
    return list(items)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a mapping that says one key twice; YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is written twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def read_file(
    path: str, options: Sequence[Option], sections: Mapping[str, Sequence[str]]
) -> Source:
    """The YAML file: keys are option names, `-` or `_`, at the top or under their section.

    `sections` maps each section's name to the names of its options.
    """
    document = _parse_yaml(path)
    source = Source()
    if document is None:
        return source
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: the file must be a mapping of option names to values.")
    names = [o.name for o in options]
    for key, value in document.items():
        name = _normalised(key)
        if name in sections and (isinstance(value, dict) or value is None):
            for inner_key, inner_value in (value or {}).items():
                shown = f"{key}.{inner_key}"
                _take(source, path, shown, inner_key, inner_value, sections[name])
        else:
            _take(source, path, str(key), key, value, names, also_known=sections)
    return source


def _take(
    source: Source,
    path: str,
    shown_key: str,
    key: object,
    value: Any,
    known: Sequence[str],
    *,
    also_known: Iterable[str] = (),
) -> None:
    name = _normalised(key)
    if name not in known:
        hint = _suggestion(name, [*known, *sorted(also_known)])
        raise ConfigError(f"{path}: unknown key {shown_key!r}.{hint}")
    if name in source.values:
        raise ConfigError(f"{path}: {name!r} is set in two places.")
    source.values[name] = value
    source.origins[name] = f"file {path}"


def _normalised(key: object) -> str:
    return str(key).replace("-", "_")


def _parse_yaml(path: str) -> Any:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config file: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the config file is not UTF-8 text.") from error
    try:
        # A subclass of SafeLoader: builds plain values only.
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of a date that is none, say
        raise ConfigError(f"{path}: not valid YAML.") from error
