"""Links that misbehave, and a peer driven by hand, for tests of the receiving side."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from cluster.node import NodeId, NodeName, new_incarnation
from cluster.proto import node_pb2 as pb
from cluster.request import Handoff, SequenceRequest
from cluster.rpc import open_channel
from kv_transfer.digests import PlaceSeal, digest_seed
from kv_transfer.frame_place import FramePlace
from kv_transfer.pool import TransferPool
from kv_transfer.protocol import (
    DIGEST_BYTES,
    CommitMessage,
    FrameHeader,
    pack_commit,
    write_header,
)
from kv_transfer.sending.kv_session import KvSessionStream, decode_ticket, reserve_frame
from kv_transfer.transports.loopback import LoopbackEndpoint, LoopbackNetwork, LoopbackTransport
from tests.kv_twins import COMPATIBLE, NUM_LAYERS, UNIT_BYTES, DecodeSide

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from kv_transfer.transfer import Ticket
    from kv_transfer.transports.base import Endpoint


class TamperingTransport(LoopbackTransport):
    """Changes what is sent: `tamper` gets a copy of each message and its tag."""

    def __init__(
        self, network: LoopbackNetwork, tamper: Callable[[torch.Tensor, int], None]
    ) -> None:
        super().__init__(network)
        self._tamper = tamper

    async def connect(self, host: str, port: int, session_id: int) -> LoopbackEndpoint:
        endpoint = await super().connect(host, port, session_id)
        send = endpoint.send

        def tampered(buffer: torch.Tensor, tag: int) -> asyncio.Future[None]:
            message = buffer.clone()
            self._tamper(message, tag)
            return send(message, tag)

        endpoint.send = tampered  # type: ignore[method-assign]
        return endpoint


@dataclass
class HandDriven:
    """A prefill node whose every message a test writes itself."""

    stream: KvSessionStream
    endpoint: Endpoint
    pool: torch.Tensor
    received: list[pb.ReceiverFrame] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    is_ended: bool = False

    @property
    def session_id(self) -> int:
        return self.stream.hello.session_id

    def reserve(self, request: SequenceRequest, *, attempt: int = 1) -> bytes:
        transfer_id = secrets.token_bytes(16)
        handoff = Handoff(
            transfer_id=transfer_id,
            attempt=attempt,
            decode=NodeId(NodeName("d0"), new_incarnation()),
            decode_address="",
            gateway_id="gateway",
        )
        self.stream.send(reserve_frame(request, handoff))
        return transfer_id

    async def next(self, kind: str) -> pb.ReceiverFrame:
        """The first message of this kind that has come or will come; it is taken off."""
        async with asyncio.timeout(10):
            while True:
                for frame in self.received:
                    if frame.WhichOneof("frame") == kind:
                        self.received.remove(frame)
                        return frame
                self.arrived.clear()
                await self.arrived.wait()

    async def ticket(self) -> Ticket:
        return decode_ticket((await self.next("ticket")).ticket)

    async def header(
        self, ticket: Ticket, seq: int, blocks: dict[int, int], *, salt: bytes = b""
    ) -> tuple[FrameHeader, torch.Tensor]:
        """A right frame of all layers of these blocks (position -> block of our pool)."""
        positions = tuple(blocks)
        seal = PlaceSeal(digest_seed(ticket.transfer_id, salt), 0, NUM_LAYERS, positions)
        num_bytes = seal.num_units * (UNIT_BYTES + DIGEST_BYTES)
        slot = torch.zeros(num_bytes, dtype=torch.uint8)
        mover = TransferPool(self.pool)
        place = FramePlace(seal, tuple(blocks.values()))
        await mover.end(mover.begin_gather(slot, place, after=None))
        mover.close()
        header = FrameHeader(
            transfer_id=ticket.transfer_id,
            incarnation=ticket.incarnation,
            epoch=ticket.epoch,
            nonce=ticket.nonce,
            seq=seq,
            layer_start=0,
            num_layers=NUM_LAYERS,
            positions=positions,
            payload_bytes=slot.numel(),
        )
        return header, slot

    def post_header(self, header: FrameHeader) -> asyncio.Future[None]:
        buffer = np.zeros(4096, dtype=np.uint8)
        length = write_header(header, buffer.data)
        return self.endpoint.send(torch.from_numpy(buffer[:length]), self.session_id)

    def post(self, header: FrameHeader, payload: torch.Tensor) -> asyncio.Future[tuple[None, None]]:
        return asyncio.gather(self.post_header(header), self.endpoint.send(payload, header.nonce))

    def commit(self, ticket: Ticket, *, num_frames: int, first_token_id: int = 7) -> None:
        commit = CommitMessage(
            transfer_id=ticket.transfer_id,
            epoch=ticket.epoch,
            nonce=ticket.nonce,
            num_frames=num_frames,
            first_token_id=first_token_id,
        )
        message = torch.from_numpy(np.frombuffer(pack_commit(commit), dtype=np.uint8).copy())
        self.endpoint.send(message, self.session_id)

    def acknowledge(self, abort: pb.ReceiverAbort, *, num_frames_posted: int) -> None:
        ack = pb.AbortAck(
            transfer_id=abort.transfer_id,
            epoch=abort.epoch,
            num_frames_posted=num_frames_posted,
        )
        self.stream.send(pb.SenderFrame(abort_ack=ack))

    async def listen(self) -> None:
        async for frame in self.stream.receive():
            self.received.append(frame)
            self.arrived.set()
        self.is_ended = True


@asynccontextmanager
async def hand_driven(
    network: LoopbackNetwork, decode: DecodeSide, pool: torch.Tensor, *, name: str = "p0"
) -> AsyncIterator[HandDriven]:
    channel = open_channel(decode.address)
    stream = await KvSessionStream.open(
        channel,
        node_id=NodeId(NodeName(name), new_incarnation()),
        ours=COMPATIBLE,
        expected=decode.node_id,
    )
    transport = LoopbackTransport(network)
    hello = stream.hello
    endpoint = await transport.connect(hello.data_host, hello.data_port, hello.session_id)
    peer = HandDriven(stream, endpoint, pool)
    listening = asyncio.create_task(peer.listen())
    try:
        yield peer
    finally:
        await stream.close()
        await asyncio.wait([listening])
        await transport.close()
        await channel.close()


async def two_frames(
    peer: HandDriven, request: SequenceRequest
) -> tuple[Ticket, list[tuple[FrameHeader, torch.Tensor]]]:
    """Reserve for `request` (two blocks) and make its two right frames."""
    peer.reserve(request)
    ticket = await peer.ticket()
    return ticket, [await peer.header(ticket, seq, {seq: 10 + seq}) for seq in range(2)]
