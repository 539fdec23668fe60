"""The slots of one sender, mapped into this process, and what it is told of our reads.

A slot that a header names is read once, and given back once: when the frame is in its blocks, or
when nobody wants it. Nothing of the sender's can be written from here.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from kv_transfer.protocol import FrameMalformed, SlotName, pack_slot_read

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from kv_transfer.protocol import FrameHeader
    from kv_transfer.transports.local_messages import LocalMessages


class SlotReader:
    """`slots`: uint8, each of a slot's size; none when they are not mapped any more."""

    def __init__(self, slots: Sequence[torch.Tensor], messages: LocalMessages) -> None:
        self._slots = slots
        self._messages = messages
        self._loop = asyncio.get_running_loop()

    def check(self, header: FrameHeader) -> SlotName:
        """The slot it names. Raises `FrameMalformed` if it names none, or one that is not there or
        smaller than its payload."""
        name = header.slot
        if name is None or name.index >= len(self._slots):
            raise FrameMalformed("its slot is not mapped here")
        if header.payload_bytes > self._slots[name.index].numel():
            raise FrameMalformed("its slot is not mapped here")
        return name

    def slot(self, name: SlotName) -> torch.Tensor:
        return self._slots[name.index]

    def done(self, name: SlotName) -> None:
        """Told after what this round of the loop has begun: a sequence that starts now waits for
        no message. Should that not arrive, the link is lost, and its owner knows."""
        self._loop.call_soon(self._messages.send, pack_slot_read(name))
