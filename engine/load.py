"""Counts of an engine's work, taken on its thread and read by others.

The engine's thread alone may look into its scheduler and block manager. It leaves a snapshot
here: now and then while it works, and always before it goes idle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cluster.clock import Clock, monotonic
from cluster.node import NodeLoad

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.block_manager import BlockManager

REFRESH_SECONDS = 0.05


class Counted(Protocol):
    """What a scheduler counts."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def queued_tokens(self) -> int: ...


class LoadSnapshot:
    """`value` is the last snapshot; transfers are added by who knows of them."""

    def __init__(
        self,
        scheduler: Counted,
        block_manager: BlockManager,
        *,
        more_waiting: Callable[[], tuple[int, int]] = lambda: (0, 0),
        clock: Clock = monotonic,
    ) -> None:
        """`more_waiting` gives sequences and tokens that wait outside the scheduler."""
        self._scheduler = scheduler
        self._block_manager = block_manager
        self._more_waiting = more_waiting
        self._clock = clock
        self._taken_at = 0.0
        self.value = NodeLoad()
        self.take()

    def take_sometimes(self) -> None:
        """Take one unless the last is fresh. Engine thread only."""
        if self._clock() - self._taken_at >= REFRESH_SECONDS:
            self.take()

    def take(self) -> None:
        """Engine thread only, or before it starts."""
        scheduler, manager = self._scheduler, self._block_manager
        num_waiting, num_tokens = self._more_waiting()
        self._taken_at = self._clock()
        self.value = NodeLoad(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + num_waiting,
            queued_tokens=scheduler.queued_tokens + num_tokens,
            num_blocks=manager.num_blocks,
            num_free_blocks=manager.num_free_blocks,
            num_cached_blocks=manager.num_cached_blocks,
        )
