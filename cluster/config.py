"""One configuration for a program, from flags, environment, file and defaults.

1. A program names its section dataclasses (fields made by `option`).
2. `load_config` reads the command line, `BATON_*` variables and the YAML file of `--config`.
3. pydantic-settings layers them (flag > environment > file > preset > default) and converts
   every value to its field's type; whatever is wrong is one line naming the flag and where
   the value came from.
4. The sections are built as plain frozen dataclasses; their `__post_init__` may refuse, by
   raising `ConfigError(..., param="field_name")`.

`UsageError` (exit 2) is a mistake on the command line, `ConfigError` (exit 3) any other.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from cluster.config_sources import (
    CONFIG_VARIABLE,
    Source,
    read_command_line,
    read_environment,
    read_file,
)
from cluster.config_validation import REDACTED, clipped, raise_for, validate
from cluster.errors import ConfigError
from cluster.options import Option, options_of, section_name

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class PresetValue:
    """What a preset sets an option to; `row` says in words where its table has it."""

    value: object
    row: str


# option name -> its value -> values of other options, e.g. rows of --performance-mode.
Presets = Mapping[str, Mapping[str, Mapping[str, PresetValue]]]
# Called with the values that are set explicitly, not yet validated, over the defaults.
ChoosePresets = Callable[[Mapping[str, object]], Presets]

_DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """The sections of one program. `origins[name]` says in words where each value came from."""

    program: str
    sections: Mapping[type, Any]
    options: tuple[Option, ...]
    origins: Mapping[str, str]
    show_config: bool = False

    def __getitem__(self, section: type[S]) -> S:
        return cast("S", self.sections[section])

    def value(self, name: str) -> Any:
        """The value of one option, by field name."""
        for each in self.options:
            if each.name == name:
                return getattr(self.sections[each.section], name)
        raise KeyError(name)

    def is_explicit(self, name: str) -> bool:
        """True when a person set it: by flag, environment or file."""
        return self.origins[name].split(" ", 1)[0] in ("flag", "argument", "environment", "file")


def load_config(
    program: str,
    sections: Sequence[type],
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    positional: str | None = None,
    presets: ChoosePresets | None = None,
    description: str | None = None,
) -> LoadedConfig:
    """Build the sections of `program`; raises `UsageError` or `ConfigError`.

    `positional` names the option that may also be given as a bare argument. When
    `show_config` of the result is set, the caller prints `render_config` and exits with 0.
    """
    options = _flatten(sections)
    line = read_command_line(program, options, argv, positional=positional, description=description)
    sources = [line.source, read_environment(options, env)]
    members = {section_name(s): [o.name for o in options_of(s)] for s in sections}
    if line.config_path is not None:
        sources.append(read_file(line.config_path, options, members))
    elif path := env.get(CONFIG_VARIABLE):
        try:
            sources.append(read_file(path, options, members))
        except ConfigError as error:
            raise ConfigError(f"{error.message} {CONFIG_VARIABLE} names this file.") from error
    if presets is not None:
        sources.append(_preset_source(options, sources, presets))
    origins = {o.name: _origin_of(o.name, sources) for o in options}
    values = validate(options, sources, origins, positional)
    built = {section: _build(section, options, values, origins) for section in sections}
    return LoadedConfig(program, built, tuple(options), origins, line.show_config)


def render_config(
    loaded: LoadedConfig, left_open: Mapping[str, tuple[str, str]] | None = None
) -> str:
    """The text of `--show-config`: valid YAML, each value with its origin as a comment.

    `left_open`: options that this program leaves to those it starts, with the values these will
    choose, in words, and where from. They become comments as well.
    """
    left_open = left_open or {}
    lines: list[str] = []
    for section in loaded.sections:
        lines.append(f"{section_name(section)}:")
        rows = [
            (f"  # {o.name}: {left_open[o.name][0]}", left_open[o.name][1])
            if o.name in left_open
            else (_row(o, loaded.value(o.name)), loaded.origins[o.name])
            for o in loaded.options
            if o.section is section
        ]
        width = min(max((len(text) for text, _ in rows), default=0), 60)
        lines += [f"{text:<{width}}  # {origin}" for text, origin in rows]
    return "\n".join(lines) + "\n"


def to_environment(*sections: object, leave_out: Collection[str] = frozenset()) -> dict[str, str]:
    """Section instances as `BATON_*` variables that `load_config` reads back to equal ones.

    For a program that starts others: secrets travel in the environment, never in arguments.
    None and empty lists are left out, being what an unset variable means; so are the options
    named in `leave_out`, which the other program decides.
    """
    variables: dict[str, str] = {}
    for section in sections:
        for each in options_of(type(section)):
            value = getattr(section, each.name)
            if value in (None, (), "") or each.name in leave_out:
                continue
            plain = _plain(value)
            is_text = isinstance(plain, str)
            variables[each.variable] = plain if is_text else json.dumps(plain)
    return variables


def _flatten(sections: Sequence[type]) -> list[Option]:
    """All options, once each: a name that two sections share is one flag, declared by the first."""
    owners: dict[str, Option] = {}
    for section in sections:
        for each in options_of(section):
            first = owners.setdefault(each.name, each)
            if first.value_type != each.value_type:
                raise TypeError(
                    f"Option {each.name!r} differs in {first.section.__name__} and in "
                    f"{section.__name__}."
                )
    return list(owners.values())


def _preset_source(
    options: Sequence[Option], sources: Sequence[Source], presets: ChoosePresets
) -> Source:
    result = Source()
    known = {o.name: o for o in options}
    given = {name: o.default for name, o in known.items() if not o.is_required}
    for source in reversed(sources):
        given |= source.values
    for selector, rows in presets(given).items():
        chosen = given[selector]
        for name, preset in rows.get(str(_plain(chosen)), {}).items():
            if name not in known:
                raise TypeError(f"Preset {selector}={chosen} sets the unknown option {name!r}.")
            result.values[name] = preset.value
            result.origins[name] = f"{selector.replace('_', '-')} {chosen}, row {preset.row}"
    return result


def _origin_of(name: str, sources: Sequence[Source]) -> str:
    return next((s.origins[name] for s in sources if name in s.values), _DEFAULT)


def _build(
    section: type, options: Sequence[Option], values: Mapping[str, Any], origins: Mapping[str, str]
) -> Any:
    names = {o.name for o in options_of(section)}
    own = {o.name: o for o in options if o.name in names}
    try:
        return section(**{name: values[name] for name in own})
    except ConfigError as error:
        each = own.get(error.param or "")
        if each is None:
            raise
        got = "" if each.secret else f", got {clipped(_shown(values[each.name]))}"
        said = error.message.removeprefix(each.flag).strip(" :").rstrip(".")
        raise_for(each, said + got, origins[each.name])


def _row(each: Option, value: Any) -> str:
    if each.secret and value not in (None, (), ""):
        # A comment, so that the text loads back without making the word the secret. What is a
        # default everybody may read.
        told = _shown(value) if value == each.default else REDACTED
        return f"  # {each.name}: {told}"
    return f"  {each.name}: {_shown(value)}"


def _shown(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
