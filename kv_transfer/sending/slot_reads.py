"""Which of our slots a receiver that has them mapped still reads.

Life of a read
    1. `expect`, when the header that names the slot is posted.
    2. The receiver says that the slot was read, or that nobody wants it: the future is done.
    3. The connection ends first: it fails with the link. A read that is still under way then finds
       what another frame left there; its digests cannot fit, and nobody waits for them any more.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from kv_transfer.failures import FailureReason, failure
from kv_transfer.protocol import FrameMalformed, SlotName, parse_slot_read

if TYPE_CHECKING:
    from collections.abc import Callable

    from kv_transfer.transports.local_messages import LocalMessages

logger = logging.getLogger(__name__)


class SlotReads:
    """Of one pairing. `on_malformed` is called for a message that cannot be: the link must go."""

    def __init__(self, messages: LocalMessages, on_malformed: Callable[[], None]) -> None:
        self._on_malformed = on_malformed
        self._expected: dict[SlotName, asyncio.Future[None]] = {}
        self._is_broken = False
        messages.listen(self._heard)
        messages.on_close(self._break)

    def expect(self, slot: SlotName) -> asyncio.Future[None]:
        read: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._is_broken:
            read.set_exception(failure(FailureReason.LINK_LOST))
        else:
            self._expected[slot] = read
        return read

    def _heard(self, message: memoryview) -> None:
        try:
            slot = parse_slot_read(message)
        except FrameMalformed:
            logger.warning("a peer says of its reads what cannot be understood")
            self._break()
            self._on_malformed()
            return
        read = self._expected.pop(slot, None)
        if read is not None:
            read.set_result(None)

    def _break(self) -> None:
        self._is_broken = True
        expected, self._expected = self._expected, {}
        for read in expected.values():
            read.set_exception(failure(FailureReason.LINK_LOST))
