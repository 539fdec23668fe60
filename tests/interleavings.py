"""Every order in which a small set of events can happen.

A world offers named steps; which ones are possible depends on what happened before. `explore`
runs every sequence of possible steps, each used at most once, from a fresh world, and lets the
world finish and check itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class World(Protocol):
    def possible(self) -> dict[str, Callable[[], None]]: ...
    def finish(self) -> None:
        """Let everything that is under way end, then check what must hold at the end."""


def explore(make_world: Callable[[], World], steps: Iterable[str]) -> int:
    """Run every order of `steps`; returns how many there were."""
    allowed = frozenset(steps)
    pending: list[tuple[str, ...]] = [()]
    num_runs = 0
    while pending:
        path = pending.pop()
        world = make_world()
        try:
            for name in path:
                world.possible()[name]()
        except AssertionError as error:
            raise AssertionError(f"in {' -> '.join(path)}: {error}") from error
        choices = [name for name in world.possible() if name in allowed and name not in path]
        pending.extend((*path, name) for name in choices)
        if not choices:
            num_runs += 1
            try:
                world.finish()
            except AssertionError as error:
                raise AssertionError(f"after {' -> '.join(path)}: {error}") from error
    return num_runs
