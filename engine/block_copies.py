"""Copies between the blocks of the pool and the slots of host memory, and their counters."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.host_tier import HostEntry
    from engine.reservation import Hold
    from engine.sequence import Sequence


class CopyKind(StrEnum):
    SAVE = "save"
    LOAD = "load"


@dataclass(slots=True, eq=False)
class BlockCopy:
    """Copy block `block_ids[i]` to (SAVE) or from (LOAD) slot `entries[i].slot`.

    `sequence` waits for a load; its first `first_token` tokens are in place already, and with the
    whole of it its first `end_token`. `on_end` hears how many blocks from the first on are what
    was wanted, once nothing belongs to the copy any more.
    """

    kind: CopyKind
    block_ids: tuple[int, ...]
    entries: tuple[HostEntry, ...]
    hold: Hold
    sequence: Sequence | None = None
    first_token: int = 0
    end_token: int = 0
    on_end: list[Callable[[int], None]] = field(default_factory=list)

    @property
    def slots(self) -> list[int]:
        return [entry.slot for entry in self.entries]


@dataclass(slots=True)
class HostStats:
    """Counters since start. Written by the engine's thread."""

    num_loaded_blocks: int = 0
    num_bad_blocks: int = 0  # another digest than when they were written
    num_failed_copies: int = 0
    num_lost_blocks: int = 0  # evicted before they were saved
    num_hit_tokens: int = 0  # of prompts, found in host memory at first admission
