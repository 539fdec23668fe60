"""Layers of one prompt that the device still computes.

Life of a group of layers
    1. `add`: the kernels that write it are queued; `done` happens behind them.
    2. `done` has happened: the group goes to the transfer's machine, which may plan it from then
       on. So no slot is taken, and no copy is queued, for what is not there yet.
    3. The first token is known, so all of it has been computed: what is left goes over at once.
       Its copies wait for `done` on the device.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kv_transfer.sending.outgoing import OutgoingTransfer


@dataclass(frozen=True, slots=True, eq=False)
class Computing:
    """The layers below `layer_end` of the first `num_blocks` blocks, there once `done` happened."""

    num_blocks: int
    block_table: Sequence[int]
    layer_end: int
    done: Any


class ComputingLayers:
    """In the order in which they are computed."""

    def __init__(self, machine: OutgoingTransfer) -> None:
        self._machine = machine
        self._waiting: deque[Computing] = deque()

    def add(self, group: Computing) -> bool:
        """True when it is to be waited for: `computed` must follow."""
        if group.done is None or group.done.query():
            self.hand_over()
            self._tell(group, None)
            return False
        self._waiting.append(group)
        return True

    def computed(self, group: Computing) -> None:
        """Its `done` has happened, and so have those before it."""
        while group in self._waiting:
            self._tell(self._waiting.popleft(), None)

    def hand_over(self) -> None:
        """Wait for no event here any more."""
        while self._waiting:
            group = self._waiting.popleft()
            self._tell(group, group.done)

    def _tell(self, group: Computing, after: Any) -> None:
        self._machine.layers_computed(group.num_blocks, group.block_table, group.layer_end, after)
