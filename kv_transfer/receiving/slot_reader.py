"""The slots of one sender, mapped into this process, and what it is told of our reads.

A slot that a header names is read once, and given back once: when the frame is in its blocks, or
when nobody wants it. Nothing of the sender's can be written from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kv_transfer.protocol import SLOT_READ_BYTES, FrameMalformed, SlotName, pack_slot_read
from kv_transfer.small_messages import SmallMessages

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from kv_transfer.transports.base import Endpoint


class SlotReader:
    """`slots`: uint8, each of a slot's size; none when they could not be mapped, or when they are
    not mapped any more."""

    def __init__(self, slots: Sequence[torch.Tensor], endpoint: Endpoint, session_id: int) -> None:
        self._slots = slots
        self._messages = SmallMessages(endpoint, session_id, SLOT_READ_BYTES)

    def check(self, name: SlotName, num_bytes: int) -> None:
        """Raises `FrameMalformed` for a slot that is not there, or smaller than that."""
        if not (name.index < len(self._slots) and num_bytes <= self._slots[name.index].numel()):
            raise FrameMalformed("its slot is not mapped here")

    def slot(self, name: SlotName) -> torch.Tensor:
        return self._slots[name.index]

    def done(self, name: SlotName) -> None:
        """Should the message not arrive, the link is lost, and its owner knows."""
        self._messages.send(pack_slot_read(name))
