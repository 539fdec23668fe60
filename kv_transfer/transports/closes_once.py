"""The end of a connection: it comes once, whoever brings it, and is told once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class ClosesOnce:
    def __init__(self) -> None:
        self._is_closed = False
        self._on_close: list[Callable[[], None]] = []

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call it once when the connection ends, whoever ended it; at once if it has."""
        if self._is_closed:
            callback()
        else:
            self._on_close.append(callback)

    def _end_once(self, cut: Callable[[], None] = lambda: None) -> None:
        """The first time: `cut`, then tell who asked. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        cut()
        callbacks, self._on_close = self._on_close, []
        for callback in callbacks:
            callback()
