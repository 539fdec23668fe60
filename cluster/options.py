"""An option: one dataclass field that is at once a flag, an environment variable and a YAML key.

1. A room declares a frozen dataclass whose fields are made by `option(...)`.
2. `options_of` reads the fields back as `Option`s: name, type, default and help.
3. `cluster/config.py` collects a value for each from flags, environment and file, and builds
   the dataclass.

The fields' types must be importable at run time (no `TYPE_CHECKING` imports), because flags
derive from them. Supported: bool, int, float, str, `Path`, `StrEnum`, `Literal`, any of these
`| None`, and `tuple[X, ...]` of them.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import types
import typing
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")

_METADATA_KEY = "baton.option"


@overload
def option(
    default: T,
    *,
    help: str,
    group: str | None = None,
    secret: bool = False,
    short: str | None = None,
    choices: Sequence[object] | None = None,
    aliases: Sequence[str] = (),
    metavar: str | None = None,
    advanced: bool = False,
) -> T: ...
@overload
def option(
    *,
    help: str,
    group: str | None = None,
    secret: bool = False,
    short: str | None = None,
    choices: Sequence[object] | None = None,
    aliases: Sequence[str] = (),
    metavar: str | None = None,
    advanced: bool = False,
) -> Any: ...
def option(
    default: Any = MISSING,
    *,
    help: str,
    group: str | None = None,
    secret: bool = False,
    short: str | None = None,
    choices: Sequence[object] | None = None,
    aliases: Sequence[str] = (),
    metavar: str | None = None,
    advanced: bool = False,
) -> Any:
    """A dataclass field that is an option; without `default` it is required (needs `kw_only`).

    `short` is a second visible flag ("-tp"), `aliases` are accepted flags that help does not
    show ("--mem-fraction-static"). `advanced` options appear in `--help-all` only. A `secret`
    is left out of `repr` and redacted wherever the configuration is shown.
    """
    details = {
        "help": help,
        "group": group,
        "secret": secret,
        "short": short,
        "choices": None if choices is None else tuple(choices),
        "aliases": tuple(aliases),
        "metavar": metavar,
        "advanced": advanced,
    }
    return dataclasses.field(default=default, repr=not secret, metadata={_METADATA_KEY: details})


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option as declared. `default` is `MISSING` when it is required."""

    name: str
    section: type
    type: Any
    default: Any
    help: str
    group: str | None
    secret: bool
    short: str | None
    choices: tuple[object, ...] | None
    aliases: tuple[str, ...]
    metavar: str | None
    advanced: bool

    @property
    def flag(self) -> str:
        return flag_of(self.name)

    @property
    def variable(self) -> str:
        return f"BATON_{self.name.upper()}"

    @property
    def is_required(self) -> bool:
        return self.default is MISSING

    @property
    def is_optional(self) -> bool:
        return types.NoneType in _union_members(self.type)

    @property
    def value_type(self) -> Any:
        """The type without `| None`."""
        members = [m for m in _union_members(self.type) if m is not types.NoneType]
        return members[0] if len(members) == 1 else self.type

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.value_type) is tuple

    @property
    def element_type(self) -> Any:
        """The type of one value: of each item of a list, else of the option itself."""
        return typing.get_args(self.value_type)[0] if self.is_list else self.value_type

    @property
    def is_bool(self) -> bool:
        return self.value_type is bool

    @property
    def allowed(self) -> tuple[object, ...] | None:
        """The values it may take, when they are few: given choices, enum members, literals."""
        if self.choices is not None:
            return self.choices
        element = self.element_type
        if typing.get_origin(element) is Literal:
            return typing.get_args(element)
        if isinstance(element, type) and issubclass(element, enum.Enum):
            return tuple(member.value for member in element)
        return None


def options_of(section: type) -> list[Option]:
    """The options of a section dataclass, in order of declaration.

    `TypeError` when a field was not made by `option`: a field that no flag can set is a bug.
    """
    hints = typing.get_type_hints(section)
    found: list[Option] = []
    for spec in dataclasses.fields(section):
        details = spec.metadata.get(_METADATA_KEY)
        if details is None:
            raise TypeError(f"{section.__name__}.{spec.name} is not an option().")
        found.append(
            Option(
                name=spec.name,
                section=section,
                type=hints[spec.name],
                default=spec.default,
                **details,
            )
        )
    return found


def section_name(section: type) -> str:
    """`KVTransferConfig` -> "kv_transfer": the key of the section in a nested file."""
    name = section.__name__.removesuffix("Config")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def refused(name: str, problem: str) -> ConfigError:
    """For a section that checks its values. Who loads it adds the value, and where it came from."""
    return ConfigError(f"{flag_of(name)} {problem}.", param=name)


def _union_members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)
