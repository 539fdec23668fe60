"""The three ways of a frame's payload into a pool; `sending/payloads.py` has the other ends.

    SlotArrival     received into a slot of our own, placed from there
    ReadArrival     placed from the sender's slot, which is mapped here
    PiecesArrival   received into the blocks themselves (host memory, plain TCP)

Life of an arrival
    1. `receive`: done when the payload has come. What is read is there with its header; when it is
       placed is for `read_pace.py` to say.
    2. `place`, if it is still wanted: done when nothing of it writes any more, with the verdict on
       its digests. Until then the blocks are the transfer's alone.
    3. `finish`, once, however it ended: slots go back to who owns them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kv_transfer.host_moves import ArrivalDigests

if TYPE_CHECKING:
    from kv_transfer.agent import TransferAgent
    from kv_transfer.digests import DigestKind
    from kv_transfer.frame_place import FramePlace
    from kv_transfer.protocol import FrameHeader, SlotName
    from kv_transfer.receiving.slot_reader import SlotReader
    from kv_transfer.staging import StagingSlot
    from kv_transfer.transports.base import Endpoint, PieceEndpoint


class Arrival(Protocol):
    @property
    def is_ours(self) -> bool:
        """The memory it came to is still its own."""

    def place(self) -> asyncio.Future[bool]: ...
    def finish(self) -> None: ...


class ReceivedArrival(Arrival, Protocol):
    def receive(self) -> asyncio.Future[None]: ...


class _InSlot:
    """What owns a slot of ours."""

    def __init__(self, agent: TransferAgent, slot: StagingSlot) -> None:
        self._agent, self._slot = agent, slot

    @property
    def is_ours(self) -> bool:
        return self._agent.staging.owns(self._slot)

    def finish(self) -> None:
        self._agent.staging.release(self._slot)


class SlotArrival(_InSlot):
    def __init__(
        self,
        agent: TransferAgent,
        endpoint: Endpoint,
        slot: StagingSlot,
        header: FrameHeader,
        place: FramePlace,
        digest: DigestKind,
    ) -> None:
        super().__init__(agent, slot)
        self._endpoint, self._header = endpoint, header
        self._place, self._digest = place, digest

    def receive(self) -> asyncio.Future[None]:
        payload = self._slot.payload[: self._header.payload_bytes]
        return self._endpoint.recv(payload, self._header.nonce)

    def place(self) -> asyncio.Future[bool]:
        return self._agent.pool.begin_scatter(self._slot.payload, self._place, digest=self._digest)


class ReadArrival:
    def __init__(
        self,
        agent: TransferAgent,
        reader: SlotReader,
        name: SlotName,
        place: FramePlace,
        digest: DigestKind,
    ) -> None:
        self._agent, self._reader, self._name = agent, reader, name
        self._place, self._digest = place, digest

    @property
    def is_ours(self) -> bool:
        return True  # whatever else has come to stand there has other digests

    def place(self) -> asyncio.Future[bool]:
        slot = self._reader.slot(self._name)
        return self._agent.pool.begin_scatter(slot, self._place, digest=self._digest)

    def finish(self) -> None:
        self._reader.done(self._name)


class PiecesArrival(_InSlot):
    """The slot stays empty: it bounds how much is on its way."""

    def __init__(
        self,
        agent: TransferAgent,
        endpoint: PieceEndpoint,
        slot: StagingSlot,
        header: FrameHeader,
        place: FramePlace,
    ) -> None:
        super().__init__(agent, slot)
        self._endpoint, self._header, self._place = endpoint, header, place
        self._digests = ArrivalDigests(place.seal)

    def receive(self) -> asyncio.Future[None]:
        pool, digests = self._agent.pool, self._digests
        examine = digests.add if pool.takes_digests else None
        pieces, behind = pool.pieces(self._place), [digests.claimed.view(np.uint8)]
        return self._endpoint.recv_pieces(pieces, self._header.nonce, examine, behind)

    def place(self) -> asyncio.Future[bool]:
        """It is where it belongs already."""
        is_right = not self._agent.pool.takes_digests or self._digests.are_right
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        done.set_result(is_right)
        return done
