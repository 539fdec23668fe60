"""The shell around `ReadPace`: its timer, and the calls that begin what is due.

What breaks as one read begins is that one's: others wait for the same timer. All methods run on the
event loop.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from cluster.isolation import isolated
from kv_transfer.receiving.read_pace import Read, ReadPace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.clock import Clock
    from kv_transfer.stats import TransferStats

logger = logging.getLogger(__name__)
# While anything waits: whether it is still wanted, and whether anything is decoded.
_LOOK_SECONDS = 0.01


class PacedReads:
    """One per receiver. `is_wanted`: of a transfer, whether its frames are. `is_decoding`: whether
    this node computes."""

    def __init__(
        self,
        pace: ReadPace,
        *,
        is_wanted: Callable[[bytes], bool],
        is_decoding: Callable[[], bool],
        clock: Clock,
        stats: TransferStats,
    ) -> None:
        self._pace = pace
        self._is_wanted = is_wanted
        self._is_decoding = is_decoding
        self._clock = clock
        self._stats = stats
        self._timer: asyncio.TimerHandle | None = None

    def begin(
        self,
        transfer_id: bytes,
        num_bytes: int,
        begin: Callable[[], None],
        drop: Callable[[], None],
        *,
        is_awaited: bool,
    ) -> None:
        """Call `begin`, now or when it is time for so many bytes, or else `drop`."""
        now = self._clock()
        read = Read(transfer_id, num_bytes, now, is_awaited, begin, drop)
        due = self._pace.asked(read, now, is_decoding=self._is_decoding())
        if read not in due:
            self._stats.reads_held_back += 1
        self._begin(due)

    def _begin(self, due: Sequence[Read]) -> None:
        for read in due:
            _call(read.begin)
        if not self._pace.is_empty and self._timer is None:
            seconds = min(self._pace.seconds_to_next(self._clock()), _LOOK_SECONDS)
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, seconds), self._look)

    def _look(self) -> None:
        self._timer = None
        for read in self._pace.without(self._is_wanted):
            _call(read.drop)
        self._begin(self._pace.due(self._clock(), is_decoding=self._is_decoding()))


def _call(tell: Callable[[], None]) -> None:
    isolated(tell, "a read could not be begun or dropped", logger)  # by it the frame has ended
