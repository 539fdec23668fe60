"""One row of the bug catalogue: a bug that others had, and the lines that keep it away."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutation:
    """`old` stands exactly once in `file`; with `new` in its place, `test` must fail."""

    file: str
    old: str
    new: str
    test: str

    def applied_to(self, text: str) -> str:
        """Raises `LookupError` when the line is not there any more, or not alone."""
        count = text.count(self.old)
        if count != 1:
            raise LookupError(f"{self.file}: the protective text stands there {count} times.")
        return text.replace(self.old, self.new)


@dataclass(frozen=True, slots=True)
class Row:
    """`reports`: where the bug was seen. `mutations`: each takes one protection away."""

    bug: str
    reports: str
    mutations: tuple[Mutation, ...]
