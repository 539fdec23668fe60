"""The three ways of a frame's payload out of a pool.

    SlotPayload     packed into a slot, sent from there
    ReadPayload     packed into a slot that the receiver has mapped, and reads when it likes
    PiecesPayload   sent from the blocks themselves (host memory, plain TCP)

Life of a payload
    1. Made: packing begins; `packed` is done when it has ended.
    2. `send`, with the frame's header on its way: the future is done when nobody reads slot or
       blocks any more.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kv_transfer.host_moves import DepartureDigests
from kv_transfer.protocol import SlotName

if TYPE_CHECKING:
    from typing import Any

    from kv_transfer.agent import TransferAgent
    from kv_transfer.frame_place import FramePlace
    from kv_transfer.sending.data_link import DataLink
    from kv_transfer.sending.slot_reads import SlotReads
    from kv_transfer.staging import StagingSlot
    from kv_transfer.transports.base import PieceEndpoint


class Payload(Protocol):
    @property
    def packed(self) -> asyncio.Future[Any]: ...

    @property
    def read_from(self) -> SlotName | None:
        """The slot that the receiver reads; None when the payload is sent."""

    def send(self, num_bytes: int, nonce: int) -> asyncio.Future[None]: ...


class SlotPayload:
    def __init__(
        self, agent: TransferAgent, link: DataLink, slot: StagingSlot, frame: FramePlace, after: Any
    ) -> None:
        self._slot, self._endpoint = slot, link.endpoint
        self.packed: asyncio.Future[None] = agent.pool.begin_gather(
            slot.payload, frame, after=after, digest=link.digest
        )

    @property
    def read_from(self) -> SlotName | None:
        return None

    def send(self, num_bytes: int, nonce: int) -> asyncio.Future[None]:
        return self._endpoint.send(self._slot.payload[:num_bytes], nonce)


class ReadPayload(SlotPayload):
    def __init__(
        self,
        agent: TransferAgent,
        link: DataLink,
        reads: SlotReads,
        slot: StagingSlot,
        frame: FramePlace,
        after: Any,
    ) -> None:
        super().__init__(agent, link, slot, frame, after)
        self._reads = reads
        self._name = SlotName(slot.index, slot.generation)

    @property
    def read_from(self) -> SlotName | None:
        return self._name

    def send(self, num_bytes: int, nonce: int) -> asyncio.Future[None]:
        return self._reads.expect(self._name)


class PiecesPayload:
    """The slot that belongs to its frame stays empty: it bounds how much is on its way.

    Nothing is packed, and digests are taken of each few units right after they were sent: these
    are read from memory once for both."""

    def __init__(self, agent: TransferAgent, endpoint: PieceEndpoint, frame: FramePlace) -> None:
        self._agent, self._endpoint, self._frame = agent, endpoint, frame
        self.packed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.packed.set_result(None)

    @property
    def read_from(self) -> SlotName | None:
        return None

    def send(self, num_bytes: int, nonce: int) -> asyncio.Future[None]:
        pool, digests = self._agent.pool, DepartureDigests(self._frame.seal)
        examine = digests.add if pool.takes_digests else None
        pieces, behind = pool.pieces(self._frame), [digests.sealed.view(np.uint8)]
        return self._endpoint.send_pieces(pieces, nonce, examine, behind)
