"""Typed reading of JSON that others wrote: a wrong type is a `ConfigError`, never a crash."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises `ConfigError` when the file is missing, unreadable, or holds no JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{path.parent} holds no {path.name}.", param="model") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", param="model") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object.", param="model")
    return value


class JsonFacts:
    """One JSON object. A missing or null key gives the default, or an error when there is none."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self._source = source

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def is_null(self, name: str) -> bool:
        """True when the key is there and says null, which is not the same as being absent."""
        return name in self._values and self._values[name] is None

    def child(self, name: str) -> JsonFacts | None:
        value = self._values.get(name)
        if not value:
            return None
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return JsonFacts(value, self._source)

    def children(self) -> list[JsonFacts]:
        """Every value of this object, each of which must be an object."""
        for name, value in self._values.items():
            if not isinstance(value, dict):
                raise self._wrong(name, "an object")
        return [JsonFacts(value, self._source) for value in self._values.values()]

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "an integer")
        return value

    def positive_int(self, name: str, default: int | None = None) -> int:
        value = self.integer(name, default)
        if value < 1:
            raise self._wrong(name, "a positive integer")
        return value

    def integers(self, name: str) -> list[int]:
        """An integer or a list of them; absent is an empty list."""
        value = self._values.get(name)
        if value is None:
            return []
        values = value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in values):
            raise self._wrong(name, "an integer or a list of integers")
        return values

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number")
        if not math.isfinite(value):
            raise self._wrong(name, "a finite number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def string(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def strings(self, name: str) -> list[str]:
        """A list of strings; absent is an empty list."""
        value = self._values.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or any(not isinstance(item, str) for item in value):
            raise self._wrong(name, "a list of strings")
        return value

    def _get(self, name: str, default: object) -> Any:
        value = self._values.get(name)
        if value is not None:
            return value
        if default is None:
            raise ConfigError(f"{self._source} lacks {name}.", param="model")
        return default

    def _wrong(self, name: str, expected: str) -> ConfigError:
        return ConfigError(f"{self._source}: {name} must be {expected}.", param="model")
