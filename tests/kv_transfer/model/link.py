"""The connection of one pair of processes: control messages in order, frames on their way."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kv_transfer.protocol import parse_header, write_header
from kv_transfer.receiving.incoming import EPOCH_MASK
from tests.kv_transfer.model.memory import LIMITS

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from cluster.errors import ServingError
    from kv_transfer.protocol import FrameHeader


@dataclass(eq=False)
class Frame:
    """A posted frame. `settle` tells the sender that its send has ended; a copy that the network
    made has none."""

    header: bytes
    payload: NDArray[np.uint64]
    settle: Callable[[ServingError | None], None] = lambda _: None
    is_spoilt: bool = False  # its header cannot be read

    @classmethod
    def of(cls, header: FrameHeader, payload: NDArray[np.uint64]) -> Frame:
        buffer = np.zeros(LIMITS.max_header_bytes, dtype=np.uint8)
        length = write_header(header, buffer.data)
        return cls(buffer[:length].tobytes(), payload.copy())

    def end(self, error: ServingError | None) -> None:
        """The send has ended, at the latest here."""
        settle, self.settle = self.settle, lambda _: None
        settle(error)

    def of_another_owner(self) -> Frame:
        """Well formed, but under another ticket, and with other bytes."""
        header = parse_header(memoryview(self.header), LIMITS)
        return Frame.of(replace(header, epoch=(header.epoch - 2) & EPOCH_MASK), ~self.payload)

    def again(self) -> Frame:
        return replace(self, payload=self.payload.copy(), settle=lambda _: None)


@dataclass(eq=False)
class Link:
    """`is_cut`: nothing moves on it any more, whatever either end does."""

    id: int
    up: deque[Any] = field(default_factory=deque)  # from the prefill node
    down: deque[Any] = field(default_factory=deque)
    wire: deque[Frame] = field(default_factory=deque)  # headers are read in this order
    is_cut: bool = False
    is_noticed: bool = False  # by the prefill node
