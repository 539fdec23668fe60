"""The sending side of every hand-off of one prefill node.

Life of a hand-off
    1. `open` when the prompt is first scheduled: `Reserve` goes to its decode node, which is
       paired with first if need be.
    2. `layers_computed` while a chunk is computed, `chunk_computed` after it: blocks it completes,
       and that the decode node lacks, are packed and sent while later layers compute.
    3. `commit` with the first token: the last blocks, then `Commit`.
    4. `on_committed`, or `on_failed` with a typed error; or nothing, after `abort`.
    5. `on_sources_free`, once, when no send reads the prompt's blocks any more.

The rules are in `outgoing.py`; this is its shell, which keeps its books in `sendings.py` and leaves
what decode nodes say to `answers.py`. All methods and callbacks run on
the event loop. Leases: the source blocks are granted to the decode node, which renews them; a
lease that ran out ends the transfer, and is looked at again before each frame is posted. A peer
that lives but takes nothing does not hold them for ever: a transfer that stalls is ended, and one
that has ended but whose sends do not is cut off with its whole connection.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from cluster.clock import Clock, monotonic
from cluster.errors import RequestTooLarge
from cluster.proto import node_pb2 as pb
from cluster.rpc import open_channel
from kv_transfer.digests import digest_seed
from kv_transfer.failures import FailureReason, failure
from kv_transfer.lease import LeaseTable
from kv_transfer.sending.answers import Answers
from kv_transfer.sending.computing import Computing
from kv_transfer.sending.kv_session import (
    encode_instruction,
    renew_frame,
    reserve_frame,
)
from kv_transfer.sending.outgoing import Instruction, OutgoingTransfer
from kv_transfer.sending.outgoing_instructions import (
    FreeSources,
    ReportCommitted,
    ReportFailed,
    SendAbort,
    SendAbortAck,
    SendCommit,
)
from kv_transfer.sending.peer import Peer
from kv_transfer.sending.sendings import Sending, Sendings, commit_message
from kv_transfer.sweeping import sweep_forever
from kv_transfer.telling import told
from kv_transfer.transfer import stall_limit

if TYPE_CHECKING:
    from cluster.errors import ServingError
    from cluster.node import NodeId
    from cluster.request import Handoff, SequenceRequest
    from kv_transfer.agent import TransferAgent
    from kv_transfer.handshake import Compatibility

logger = logging.getLogger(__name__)

TOMBSTONE_LEASES = 2


class SenderEvents(Protocol):
    """The node that owns the source blocks. What it raises is logged; nothing here waits for it."""

    def on_committed(self, sequence_id: str) -> None: ...
    def on_failed(self, sequence_id: str, error: ServingError) -> None: ...
    def on_sources_free(self, sequence_id: str) -> None: ...


ChannelFactory = Callable[[str], grpc.aio.Channel]


class KVSender:
    """One per prefill node."""

    def __init__(
        self,
        *,
        node_id: NodeId,
        compatibility: Compatibility,
        agent: TransferAgent,
        block_size: int,
        events: SenderEvents,
        open_channel: ChannelFactory = open_channel,
        clock: Clock = monotonic,
    ) -> None:
        self._node_id = node_id
        self._compatibility = compatibility
        self.agent = agent
        self._block_size = block_size
        self._events = events
        self._open_channel = open_channel
        self._clock = clock
        self._leases = LeaseTable(agent.config.lease_seconds)
        self._sendings = Sendings()
        self._answers = Answers(self._sendings, self._leases, self.did, clock)
        self._peers: dict[NodeId, Peer] = {}
        self._ending: set[asyncio.Task[None]] = set()  # of lost peers: what was posted may read
        self._sweeping: asyncio.Task[None] | None = None

    @property
    def num_transfers(self) -> int:
        """Those whose source blocks are still held, and will come back."""
        return sum(not sending.is_stuck for sending in self._sendings)

    @property
    def num_quarantined_blocks(self) -> int:
        """Source blocks of transfers that have ended, but that a send may still read."""
        kept = (each for each in self._sendings if each.machine.is_draining or each.is_stuck)
        return sum(sending.machine.num_source_blocks for sending in kept)

    def is_stuck(self, sequence_id: str) -> bool:
        """Its connection was cut, but nobody can say when its source blocks come back."""
        sending = self._sendings.of_sequence(sequence_id)
        return sending is not None and sending.is_stuck

    async def start(self) -> None:
        self._sweeping = asyncio.create_task(sweep_forever(self, self.agent.config.lease_seconds))

    async def close(self) -> None:
        """End every hand-off and every pairing; sources are free when it returns."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        for peer in list(self._peers.values()):
            await peer.close()
        if self._ending:
            await asyncio.wait(self._ending)

    # ---- what the node says -----------------------------------------------------------------

    def pair(self, decode: NodeId, address: str) -> None:
        """Connect before there is traffic. A failure shows when a hand-off needs the pair."""
        self._peer_for(decode, address)

    def open(self, request: SequenceRequest, handoff: Handoff) -> None:
        """Ask the decode node for blocks. Raises `ValueError` for a sequence whose earlier
        hand-off still holds sources, and for the id of a transfer that does."""
        if self._sendings.of_sequence(request.sequence_id) is not None:
            raise ValueError("the sequence is being handed off already")
        if handoff.transfer_id in self._sendings:
            raise ValueError("the transfer is another sequence's")
        num_blocks = -(-len(request.prompt_token_ids) // self._block_size)
        sending = Sending(
            request=request,
            handoff=handoff,
            machine=OutgoingTransfer(num_layers=self.agent.pool.num_layers, num_blocks=num_blocks),
            digest_seed=digest_seed(handoff.transfer_id, request.cache_salt),
            peer=self._peer_for(handoff.decode, handoff.decode_address),
            progress_at=self._clock(),
        )
        self._sendings.add(sending)
        self._leases.grant(handoff.transfer_id, self._clock())
        if sending.peer.is_ready:
            self._reserve(sending)

    def chunk_computed(
        self, sequence_id: str, num_computed_tokens: int, block_table: Sequence[int], done: Any
    ) -> None:
        """The KV of the first `num_computed_tokens` tokens is in the blocks once `done` (a CUDA
        event, None on the CPU) has happened. Nothing for a hand-off that has ended."""
        self.layers_computed(
            sequence_id, num_computed_tokens, block_table, self.agent.pool.num_layers, done
        )

    def layers_computed(
        self,
        sequence_id: str,
        num_computed_tokens: int,
        block_table: Sequence[int],
        layer_end: int,
        done: Any,
    ) -> None:
        """The same of the layers below `layer_end` alone, while later ones are computed."""
        sending = self._sendings.of_sequence(sequence_id)
        if sending is None:
            return
        num_prompt_tokens = len(sending.request.prompt_token_ids)
        num_blocks = num_computed_tokens // self._block_size
        if num_computed_tokens >= num_prompt_tokens:
            num_blocks = sending.machine.num_blocks
        group = Computing(num_blocks, block_table, layer_end, done)
        if not sending.computing.add(group):
            self._wake(sending)
            return
        # A first token waits for the last layers; one seen late would hold up the one behind it.
        is_urgent = layer_end >= self.agent.pool.num_layers - 1
        tell = partial(self._on_computed, sending, group)
        self.agent.pool.when_computed(done, tell, is_urgent=is_urgent)

    def _on_computed(self, sending: Sending, group: Computing, _: Exception | None) -> None:
        """An error of the device shows again, and is told, when its blocks are packed."""
        sending.computing.computed(group)
        self._wake(sending)

    def commit(self, sequence_id: str, first_token_id: int) -> None:
        """The whole prompt is computed and this is its first token."""
        sending = self._sendings.of_sequence(sequence_id)
        if sending is not None:
            sending.computing.hand_over()
            self.did(sending, sending.machine.commit_asked(first_token_id))
            self._wake(sending)

    def abort(self, sequence_id: str, *, finished: bool = False) -> None:
        """The KV is not needed on the decode node any more: cancelled, or `finished` with its
        first token. No callback but `on_sources_free`. Idempotent."""
        sending = self._sendings.of_sequence(sequence_id)
        if sending is not None:
            logger.debug("hand-off of %s withdrawn, finished: %s", sequence_id, finished)
            self.did(sending, sending.machine.withdrawn())

    def leases(self) -> list[pb.LeaseInfo]:
        now = self._clock()
        return [
            pb.LeaseInfo(
                transfer_id=sending.transfer_id,
                sequence_id=sending.sequence_id,
                peer=sending.handoff.decode.name,
                state=sending.machine.state.value,
                num_blocks=sending.machine.num_blocks,
                expires_in_seconds=self._leases.remaining_seconds(sending.transfer_id, now),
            )
            for sending in self._sendings
        ]

    def sweep(self) -> None:
        """Act on what time alone has changed. Runs on a timer; tests call it."""
        now = self._clock()
        for transfer_id in self._leases.expire(now):
            self._expire(self._sendings[transfer_id])
        for sending in list(self._sendings):
            self._check_progress(sending, now)
        for transfer_id in self._leases.due_renewals(now):
            peer, extension = self._sendings[transfer_id].peer, self._leases.extension_seconds
            peer.send(renew_frame(transfer_id, extension, peer.num_posted))
        self._sendings.forget_until(now)

    # ---- what a peer says (`PeerEvents`) ------------------------------------------------------

    def paired(self, peer: Peer) -> None:
        for sending in self._sendings.of_peer(peer):
            self._reserve(sending)

    def received(self, peer: Peer, frame: pb.ReceiverFrame) -> None:
        self._answers.received(peer, frame)

    def lost(self, peer: Peer, error: ServingError) -> None:
        if self._peers.get(peer.node_id) is peer:
            del self._peers[peer.node_id]
        self._ending.add(peer.running)
        peer.running.add_done_callback(self._ending.discard)
        for sending in self._sendings.of_peer(peer):
            self.did(sending, sending.machine.peer_lost(error))

    def stuck(self, peer: Peer) -> int:
        """Its sends did not end with the connection: how many source blocks stay held."""
        stuck = self._sendings.of_peer(peer)
        for sending in stuck:
            sending.is_stuck = True
        return sum(sending.machine.num_source_blocks for sending in stuck)

    def next_shipment(self, peer: Peer) -> Sending | None:
        """The oldest hand-off to this peer that has something to ship."""
        for sending in self._sendings:
            if sending.peer is peer and sending.machine.has_frame:
                return sending
        return None

    def may_post(self, shipment: Sending) -> bool:
        """Looked at right before a frame is posted: its sources must still be leased."""
        if not shipment.machine.may_post:
            return False
        if self._leases.is_live(shipment.transfer_id, self._clock()):
            return True
        self._expire(shipment)
        return False

    def did(self, shipment: Sending, instructions: list[Instruction]) -> None:
        """Carry out what the machine of a hand-off says."""
        shipment.note_progress(self._clock())
        for instruction in instructions:
            match instruction:
                case SendCommit():
                    shipment.peer.commit(commit_message(instruction, shipment))
                case SendAbort() | SendAbortAck():
                    shipment.peer.send(encode_instruction(instruction, shipment.transfer_id))
                case ReportCommitted():
                    self._count_done(shipment)
                    told(partial(self._events.on_committed, shipment.sequence_id))
                case ReportFailed(error):
                    self.agent.stats.failed(error, shipment.handoff.kv_load_failure_policy)
                    told(partial(self._events.on_failed, shipment.sequence_id, error))
                case FreeSources():
                    self._forget(shipment)
                    told(partial(self._events.on_sources_free, shipment.sequence_id))

    # ---- helpers ------------------------------------------------------------------------------

    def _reserve(self, sending: Sending) -> None:
        """What the decode node cannot be sent at all ends like what it refuses: not before whoever
        opened it has it."""
        try:
            sending.peer.send(reserve_frame(sending.request, sending.handoff))
        except RequestTooLarge as error:
            refuse = partial(self._refused, sending, error)
            asyncio.get_running_loop().call_soon(refuse)

    def _refused(self, sending: Sending, error: ServingError) -> None:
        self.did(sending, sending.machine.refused(error))

    def _peer_for(self, decode: NodeId, address: str) -> Peer:
        peer = self._peers.get(decode)
        if peer is None:
            peer = Peer(
                decode,
                address,
                us=self._node_id,
                ours=self._compatibility,
                agent=self.agent,
                channel=self._open_channel(address),
                events=self,
            )
            self._peers[decode] = peer
        return peer

    def _wake(self, sending: Sending) -> None:
        if sending.machine.has_frame:
            sending.peer.wake()

    def _expire(
        self, sending: Sending, reason: FailureReason = FailureReason.LEASE_EXPIRED
    ) -> None:
        self.did(sending, sending.machine.expired(failure(reason)))

    def _check_progress(self, sending: Sending, now: float) -> None:
        seconds, config = now - sending.progress_at, self.agent.config
        machine = sending.machine
        limit = stall_limit(config.stall_seconds, sending.request.deadline_seconds)
        if machine.is_draining and seconds >= config.drain_seconds:
            sending.peer.cut()
        elif machine.waits_for_peer and seconds >= limit:
            self._expire(sending, FailureReason.TRANSFER_TIMEOUT)
        elif machine.waits_for_sends and seconds >= config.stall_seconds:
            sending.peer.cut()

    def _count_done(self, sending: Sending) -> None:
        self.agent.stats.transfers_done += 1
        self.agent.stats.transfer_seconds += time.monotonic() - sending.began_at

    def _forget(self, sending: Sending) -> None:
        self._leases.release(sending.transfer_id)
        forget_at = self._clock() + TOMBSTONE_LEASES * self._leases.duration_seconds
        self._sendings.end(sending, forget_at=forget_at)
