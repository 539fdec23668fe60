"""Whether what was given for the options is valid, and in which words it is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from pydantic import AfterValidator, BeforeValidator, ConfigDict, ValidationError, create_model
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource

from cluster.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cluster.config_sources import Source
    from cluster.options import Option


REDACTED = "[redacted]"
MAX_SHOWN = 80  # characters of a value


def validate(
    options: Sequence[Option],
    sources: Sequence[Source],
    origins: Mapping[str, str],
    positional: str | None = None,
) -> dict[str, Any]:
    """`positional`: the option that a bare argument is, and is asked for as one."""

    class Layered(BaseSettings):
        model_config = ConfigDict(  # type: ignore[assignment]
            extra="forbid", protected_namespaces=(), allow_inf_nan=False
        )

        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *_: Any, **__: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return tuple(InitSettingsSource(settings_cls, s.values) for s in sources)

    fields: dict[str, Any] = {
        o.name: (_checked_type(o), ... if o.is_required else o.default) for o in options
    }
    model = create_model("Settings", __base__=Layered, **fields)
    try:
        settings = model()
    except ValidationError as error:
        _refuse_value(error, {o.name: o for o in options}, origins, positional)
    return {o.name: getattr(settings, o.name) for o in options}


def _checked_type(each: Option) -> Any:
    checks: list[Any] = [BeforeValidator(_input_rule(each))]
    if each.choices is not None:
        checks.append(AfterValidator(_choice_rule(each)))
    result = each.type
    for check in checks:
        result = Annotated[result, check]
    return result


def _input_rule(each: Option) -> Callable[[Any], Any]:
    """What pydantic alone would let through: a YAML `true` for a number, one word for a list."""
    accepts_bool = each.is_bool

    def rule(value: Any) -> Any:
        if isinstance(value, bool) and not accepts_bool:
            raise ValueError("a boolean does not fit here")
        if accepts_bool and isinstance(value, int) and not isinstance(value, bool):
            raise ValueError("must be true or false")
        if each.is_optional and isinstance(value, str) and value.lower() in ("none", "null"):
            return None
        if each.is_list and isinstance(value, (str, int, float)):
            return (value,)
        return value

    return rule


def _choice_rule(each: Option) -> Callable[[Any], Any]:
    allowed = each.choices or ()

    def rule(value: Any) -> Any:
        for item in value if each.is_list else (value,):
            if item is not None and item not in allowed:
                raise ValueError("must be one of " + ", ".join(str(a) for a in allowed))
        return value

    return rule


def _refuse_value(
    error: ValidationError,
    known: Mapping[str, Option],
    origins: Mapping[str, str],
    positional: str | None,
) -> NoReturn:
    first = error.errors()[0]
    each = known[str(first["loc"][0])]
    if first["type"] == "missing":
        wanted, others = each.flag, f"{each.variable}, or {each.name} in the config file"
        if each.name == positional:
            wanted, others = each.name.upper(), f"{each.flag}, {others}"
        raise UsageError(f"{wanted} is required (also as {others}).", param=each.name)
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = message.partition(", unable to")[0].replace("valid integer", "whole number")
    message = message.partition(" for <class")[0]
    got = REDACTED if each.secret else clipped(repr(first["input"]))
    raise_for(each, f"{message}, got {got}", origins[each.name])


def clipped(text: str) -> str:
    """Of a value, as much as tells which it is: a message stays a line."""
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + " …"


def raise_for(each: Option, message: str, origin: str) -> NoReturn:
    kind = UsageError if origin.startswith(("flag", "argument")) else ConfigError
    where = "" if origin == f"flag {each.flag}" else f" ({origin})"
    # From None: the cause holds the value as given, and that may be a secret.
    raise kind(f"{each.flag}: {message}{where}.", param=each.name) from None
