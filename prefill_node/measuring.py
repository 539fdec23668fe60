"""Spare blocks and plain bytes for a decode node that measures how fast they come.

Life of a measured hand-off, on the prefill node
    1. `SendScratch`: the decode node asks. Refused while prompts are here, and when none of the
       blocks is spare; one at a time, so the next waits until the last one's sources are free.
    2. The blocks go out like a prefix that is given away (`kv_transfer/sending/prefixes.py`):
       whatever they hold, under a ticket and digests. What is cached is not among them.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from cluster.codec import decode_handoff, decode_sequence
from cluster.errors import InvalidRequest, NodeUnavailable, Overloaded
from cluster.proto import node_pb2 as pb
from cluster.proto import node_pb2_grpc as rpc
from engine.loop_errors import unawaited
from kv_transfer.idle import IDLE_SECONDS, until_idle
from kv_transfer.plain_copy import NONCE_BYTES, send_plain
from kv_transfer.sending.prefixes import HeldPrefix, PrefixSender
from node_parts.spare_blocks import reserve_spare

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.request import SequenceRequest
    from engine.block_manager import BlockManager
    from engine.loop import EngineLoop
    from engine.reservation import Reservation
    from kv_transfer.sending.sender import KVSender, SenderEvents


class ScratchSender(rpc.MeasuringServicer):
    """`is_idle`: this node has no work of its own. `others` hears what the sender reports of other
    sequences."""

    def __init__(
        self,
        block_manager: BlockManager,
        loop: EngineLoop,
        others: SenderEvents,
        *,
        is_idle: Callable[[], bool],
    ) -> None:
        self._block_manager = block_manager
        self._is_idle = is_idle
        self._is_free = asyncio.Lock()
        self._loop = loop
        self.events = PrefixSender(self._hold, block_manager.block_size, others)

    def bind(self, sender: KVSender) -> None:
        self.events.bind(sender)

    async def SendScratch(
        self, request: pb.SendScratchRequest, context: Any
    ) -> pb.SendScratchReply:
        sequence, handoff = decode_sequence(request.sequence), decode_handoff(request.handoff)
        return pb.SendScratchReply(num_tokens=await self.events.send(sequence, handoff, 0.0))

    async def SendPlain(self, request: pb.SendPlainRequest, context: Any) -> pb.SendPlainReply:
        if len(request.nonce) != NONCE_BYTES:
            raise InvalidRequest("The nonce has another size.", param="nonce")
        try:
            rate = await asyncio.to_thread(send_plain, request.host, request.port, request.nonce)
        except OSError as error:
            raise NodeUnavailable(f"No plain copy: {error}", reason="plain_copy") from error
        return pb.SendPlainReply(bytes_per_second=rate)

    async def _hold(self, sequence: SequenceRequest, _: float) -> HeldPrefix:
        """Up to as many blocks as the sequence has, and half of what is spare at most."""
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                await self._is_free.acquire()
        except TimeoutError:
            raise Overloaded("Another hand-off is being measured.", reason="measuring") from None
        with ExitStack() as failing:
            failing.callback(self._is_free.release)
            await until_idle(self._is_idle, "The prefill node")
            num_blocks = len(sequence.prompt_token_ids) // self._block_manager.block_size
            reservation = await reserve_spare(
                self._loop,
                self._block_manager,
                sequence.sequence_id,
                lambda num_spare: min(num_blocks, num_spare // 2),
            )
            failing.pop_all()
        return HeldPrefix(reservation.block_ids, lambda: self._release(reservation))

    def _release(self, reservation: Reservation) -> None:
        unawaited(self._loop.call(reservation.cancel))
        self._is_free.release()
