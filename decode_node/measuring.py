"""How fast KV comes from a prefill node: the answer to `baton doctor --cluster`.

Life of a measurement, on the decode node
    1. One at a time, and only once nothing runs here or there; a node that stays busy refuses.
    2. Some hand-offs of spare blocks, over the same pair, tickets, slots and digests as any other.
       The first one connects the pair, and warms up.
    3. A plain copy between the same two: over a socket, or from GPU to GPU.
    4. The median of either.

It takes half of the spare blocks at most, and no more than `MAX_BYTES` or `MAX_BLOCKS`; in all
`LIMIT_SECONDS`.
Blocks that hold something are neither read nor given away.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

from cluster.codec import encode_handoff, encode_sequence
from cluster.errors import DeadlineExceeded, NodeUnavailable, Overloaded
from cluster.node import NodeState
from cluster.proto import node_pb2 as pb
from cluster.proto import node_pb2_grpc as rpc
from cluster.request import Handoff, SamplingParams, SequenceRequest
from cluster.rpc import error_from_rpc
from kv_transfer.idle import until_idle
from kv_transfer.plain_copy import PlainListener, peer_copy_rate
from node_parts.spare_blocks import no_spare_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from cluster.member import Member
    from decode_node.measured_source import MeasuredSource
    from kv_transfer.receiving.receiver import KVReceiver
    from kv_transfer.receiving.receiver_session import ReceiverSession

# Of one hand-off: what it takes besides its bytes, two milliseconds on GPUs, should hardly show.
MAX_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}
MAX_BLOCKS = 16384  # of small ones, whose ids and tokens would take longer than their bytes
NUM_HANDOFFS = 6
HANDOFF_SECONDS = 8.0
LIMIT_SECONDS = 25.0
ANY_HOST = ("", "0.0.0.0", "::")


class HandoffMeasuring(rpc.MeasuringServicer):
    """`block_size` in tokens, `is_idle`: this node has no work of its own."""

    def __init__(
        self,
        source: MeasuredSource,
        receiver: KVReceiver,
        *,
        block_size: int,
        is_idle: Callable[[], bool],
        open_channel: Callable[[str], grpc.aio.Channel],
    ) -> None:
        self._source = source
        self._receiver = receiver
        self._block_size = block_size
        self._is_idle = is_idle
        self._open_channel = open_channel
        self._is_measuring = False
        self._member: Member

    def bind(self, member: Member) -> None:
        self._member = member

    async def MeasureHandoff(
        self, request: pb.MeasureHandoffRequest, context: Any
    ) -> pb.MeasureHandoffReply:
        if self._is_measuring:
            raise Overloaded("Another hand-off is being measured here.", reason="measuring")
        self._is_measuring = True
        channel = self._open_channel(request.address)
        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                return await self._measure(rpc.MeasuringStub(channel), request.name)  # type: ignore[no-untyped-call]
        except TimeoutError:
            raise DeadlineExceeded("Measuring took too long.") from None
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        finally:
            self._is_measuring = False
            await channel.close()

    async def _measure(self, prefill: Any, name: str) -> pb.MeasureHandoffReply:
        if self._member.state not in (NodeState.READY, NodeState.CORDONED):
            raise NodeUnavailable("This node takes no hand-offs.", reason="not_ready")
        await until_idle(self._is_idle, "The decode node")
        pool = self._receiver.agent.pool
        block_bytes = pool.num_layers * pool.unit_bytes
        num_spare = await self._source.num_spare_blocks()
        max_blocks = min(MAX_BYTES[pool.device.type] // block_bytes, MAX_BLOCKS, num_spare // 2)
        if max_blocks == 0:
            raise no_spare_blocks()
        seconds, num_blocks = [], 0
        for _ in range(NUM_HANDOFFS):
            took, num_blocks = await self._hand_off(prefill, max_blocks)
            seconds.append(took)
        session = self._receiver.session_with(name)
        if session is None:
            raise NodeUnavailable("The pair lost its connection.", reason="link_lost")
        reference, rate = await self._plain_copy(prefill, session)
        return pb.MeasureHandoffReply(
            transport=session.transport_name,
            num_bytes=num_blocks * block_bytes,
            seconds=statistics.median(seconds[1:]),
            reference=reference,
            reference_bytes_per_second=rate,
            device=pool.device.type,
            unit_bytes=pool.unit_bytes,
        )

    async def _hand_off(self, prefill: Any, max_blocks: int) -> tuple[float, int]:
        """Seconds from the ticket to the last verified byte, and how many blocks came."""
        transfer_id = os.urandom(16)
        name = f"measured-{transfer_id.hex()}"
        sequence = SequenceRequest(
            sequence_id=name,
            request_id=name,
            prompt_token_ids=(0,) * (max_blocks * self._block_size),
            sampling=SamplingParams(max_tokens=1, seed=0),
            deadline_seconds=HANDOFF_SECONDS,
        )
        node_id = self._receiver.node_id
        handoff = Handoff(
            transfer_id=transfer_id,
            attempt=0,
            decode=node_id,
            decode_address=self._member.info.grpc_address,
            gateway_id=node_id.name,
        )
        asked = pb.SendScratchRequest(
            sequence=encode_sequence(sequence), handoff=encode_handoff(handoff)
        )
        measured = self._source.expect(name, max_blocks)
        try:
            await prefill.SendScratch(asked, timeout=HANDOFF_SECONDS)
            return await measured.done, measured.num_blocks
        finally:
            if not measured.has_ended:
                self._receiver.cancel(name)
            self._source.forget(name)

    async def _plain_copy(self, prefill: Any, session: ReceiverSession) -> tuple[str, float]:
        """What it is called, and its bytes per second."""
        if session.sender_slots:
            return "peer copy", await self._peer_copy_rate(session.sender_slots[0])
        host = self._receiver.agent.config.kv_host
        listener = PlainListener(host)
        taking = asyncio.create_task(asyncio.to_thread(listener.take))
        # Not before its thread has ended: another socket could get the same number.
        taking.add_done_callback(partial(_ended, listener.close))
        if host in ANY_HOST:
            host = self._member.info.grpc_address.rpartition(":")[0].strip("[]")
        asked = pb.SendPlainRequest(host=host, port=listener.port, nonce=listener.nonce)
        reply = await prefill.SendPlain(asked)
        try:
            await taking
        except OSError as error:
            raise NodeUnavailable(f"No plain copy: {error}", reason="plain_copy") from error
        return "plain socket", reply.bytes_per_second

    async def _peer_copy_rate(self, theirs: torch.Tensor) -> float:
        staging = self._receiver.agent.staging
        ours = await staging.acquire(self)
        copying = asyncio.create_task(asyncio.to_thread(peer_copy_rate, theirs, ours.payload))
        # Whoever waits for it may give up, but the copy goes on.
        copying.add_done_callback(partial(_ended, lambda: staging.release(ours)))
        return await asyncio.shield(copying)


def _ended(give_back: Callable[[], None], work: asyncio.Task[Any]) -> None:
    """A thread does not use it any more."""
    give_back()
    if not work.cancelled():
        work.exception()  # looked at, also where nobody waits for it any more
