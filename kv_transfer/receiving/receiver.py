"""The shell around `Intake`: sessions, tasks, timers and the node's blocks.

Life of a receiver
    1. `start`: the transport listens; a sweep runs every fraction of a lease.
    2. Each prefill node opens a session (`open_session`, called by the gRPC service), then its
       data endpoint. Control messages and frames become events of the intake, and what it
       answers is done here.
    3. A session ends with its stream, its endpoint or a drain that took too long: `revoke`,
       and only when everything of it has ended is the intake told, which frees the blocks.
    4. `close`: every session is revoked.

The rules are in `intake.py`. All methods run on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import TYPE_CHECKING

from cluster.clock import Clock, monotonic
from cluster.errors import Cancelled, InternalError, ServingError
from cluster.proto import node_pb2 as pb
from kv_transfer.failures import FailureReason, failure, failure_label
from kv_transfer.receiving.intake import Intake
from kv_transfer.receiving.intake_instructions import (
    AskBlocks,
    Dropping,
    Free,
    Instruction,
    Landing,
    ReportFailed,
    ReportWithdrawn,
    Revoke,
    SendAbort,
    SendCommitted,
    SendRefused,
    SendRenew,
    SendTicket,
    Start,
    StopAsking,
)
from kv_transfer.receiving.lookout import Lookout
from kv_transfer.receiving.paced_reads import PacedReads
from kv_transfer.receiving.read_pace import ReadPace
from kv_transfer.receiving.receiver_session import ReceiverSession
from kv_transfer.receiving.succession import Succession
from kv_transfer.trace import TRACE
from kv_transfer.transports.local_messages import LocalListener

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from typing import Any

    from cluster.node import NodeId
    from kv_transfer.agent import TransferAgent
    from kv_transfer.handshake import Compatibility
    from kv_transfer.protocol import CommitMessage, FrameHeader
    from kv_transfer.receiving.block_source import BlockSource
    from kv_transfer.receiving.incoming import IncomingSequence
    from kv_transfer.transports.base import Endpoint
    from kv_transfer.transports.local_messages import LocalMessages

logger = logging.getLogger(__name__)

MAX_SWEEP_SECONDS = 0.25


class KVReceiver:
    """One per decode node."""

    def __init__(
        self,
        *,
        node_id: NodeId,
        compatibility: Compatibility,
        agent: TransferAgent,
        source: BlockSource,
        is_decoding: Callable[[], bool] | None = None,
        clock: Clock = monotonic,
    ) -> None:
        """`is_decoding`: of a node that decodes, whether reads would hold up what it computes, and
        whether it has the time to stay awake for them."""
        self.node_id = node_id
        self.agent = agent
        self._compatibility = compatibility
        self._source = source
        self._clock = clock
        self._sessions: dict[int, ReceiverSession] = {}
        self._succession = Succession()
        self._asking: dict[bytes, asyncio.Task[None]] = {}
        self._recomputing: set[bytes] = set()  # transfers whose blocks the node goes on with
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeping: asyncio.Task[None] | None = None
        config = agent.config
        self._local = LocalListener(
            self._on_messages,
            max_bytes=agent.limits.max_header_bytes,
            hello_seconds=config.pairing_seconds,
        )
        self._intake = Intake(
            incarnation=node_id.incarnation,
            num_layers=agent.pool.num_layers,
            lease_seconds=config.lease_seconds,
            drain_seconds=config.drain_seconds,
            stall_seconds=config.stall_seconds,
            draw_nonce=_draw_nonce,
        )
        self.pace = ReadPace(
            config.receive_bytes_per_second, patience_seconds=config.patience_seconds
        )
        self._lookout = (
            None if is_decoding is None else Lookout(is_decoding, agent.pool.rehearse_arrival)
        )
        self._reads = PacedReads(
            self.pace,
            is_wanted=self.may_scatter,
            is_decoding=is_decoding or (lambda: False),
            clock=clock,
            stats=agent.stats,
        )

    @property
    def data_port(self) -> int:
        return self.agent.transport.port

    @property
    def messages_at(self) -> bytes:
        """Where senders on this machine connect for messages, if their slots are mapped here."""
        return self._local.name

    @property
    def num_transfers(self) -> int:
        return self._intake.transfers.num_active

    @property
    def num_quarantined_blocks(self) -> int:
        return self._intake.transfers.num_quarantined_blocks

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def session_with(self, name: str) -> ReceiverSession | None:
        """The connected one of this peer."""
        sessions = (each for each in self._sessions.values() if each.peer.name == name)
        return next((session for session in sessions if session.is_connected), None)

    async def start(self) -> None:
        config = self.agent.config
        await self.agent.transport.listen(config.kv_host, config.kv_port, self._on_endpoint)
        self._sweeping = asyncio.create_task(self._sweep_forever())

    async def close(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._local.close()
        for session_id in list(self._sessions):
            self.link_lost(session_id, FailureReason.RECEIVER_LOST)
        while self._tasks:
            await asyncio.wait(self._tasks)

    # ---- what the node asks -----------------------------------------------------------------

    def cancel(self, sequence_id: str) -> None:
        """Stop receiving for it. Nothing when it runs already or was never reserved."""
        error = Cancelled("The request was cancelled.", reason=FailureReason.ABORTED.value)
        self._execute(self._intake.cancelled(sequence_id, error, self._clock()))

    def sender_doubted(self, sequence_id: str) -> None:
        """A gateway has lost the prefill node. Nothing unless its transfer stands still."""
        self._execute(self._intake.sender_doubted(sequence_id, self._clock()))

    def leases(self) -> list[pb.LeaseInfo]:
        now = self._clock()
        return [
            pb.LeaseInfo(
                transfer_id=transfer.transfer_id,
                sequence_id=transfer.sequence.sequence_id,
                peer=self._peer_name(transfer.session_id),
                state=transfer.state.value,
                num_blocks=len(transfer.block_ids),
                expires_in_seconds=self._intake.remaining_seconds(transfer.transfer_id, now),
            )
            for transfer in self._intake.transfers
        ]

    def sweep(self) -> None:
        """Act on what time alone has changed. Runs on a timer; tests call it."""
        self._execute(self._intake.ticked(self._clock()))

    # ---- what a peer says (through the gRPC service) ----------------------------------------

    def open_session(self, peer: NodeId, theirs: Compatibility) -> ReceiverSession:
        """Raises `HandshakeMismatch`, or `TransferFailed` for a process that was replaced. An older
        session of the same node name is ended: that process is gone, or has given it up."""
        try:
            self._compatibility.check(theirs)
        except ServingError as error:
            self.agent.stats.handshakes_refused += 1
            logger.warning("refused prefill node %s: %s", peer.name, error.message)
            raise
        if not self._succession.admit(peer):
            logger.warning("refused an earlier process of prefill node %s", peer.name)
            raise failure(FailureReason.SENDER_REPLACED)
        for session in list(self._sessions.values()):
            if session.peer.name == peer.name:
                self.link_lost(session.id, FailureReason.SENDER_LOST)
        session = ReceiverSession(_draw_nonce(), peer, self.agent, self, self._reads)
        self._sessions[session.id] = session
        self._intake.session_opened(session.id)
        return session

    def close_session(self, session: ReceiverSession) -> None:
        """Idempotent."""
        self.link_lost(session.id, FailureReason.SENDER_LOST)

    def reserve_asked(self, session: ReceiverSession, sequence: IncomingSequence) -> None:
        self._execute(self._intake.reserve_asked(session.id, sequence, self._clock()))

    def sender_aborted(
        self,
        session: ReceiverSession,
        transfer_id: bytes,
        num_frames_posted: int,
        error: ServingError | None,
    ) -> None:
        self._execute(
            self._intake.sender_aborted(
                session.id, transfer_id, num_frames_posted, error, self._clock()
            )
        )

    def abort_acked(self, session: ReceiverSession, ack: pb.AbortAck) -> None:
        self._execute(
            self._intake.abort_acked(
                session.id, ack.transfer_id, ack.epoch, ack.num_frames_posted, self._clock()
            )
        )

    def renewed(self, session: ReceiverSession, renew: pb.Renew) -> None:
        self._intake.renewed(session.id, renew.transfer_id, renew.extend_seconds, self._clock())

    # ---- what a session's frames say ----------------------------------------------------------

    def frame_arrived(self, session_id: int, header: FrameHeader) -> Landing | Dropping:
        fate, instructions = self._intake.frame_arrived(session_id, header, self._clock())
        self._execute(instructions)
        if header.slot is not None and self._lookout is not None:
            self._lookout.stay()  # from one GPU to another all is a matter of microseconds
        return fate

    def commit_arrived(self, session_id: int, commit: CommitMessage) -> None:
        if TRACE.is_on:
            TRACE.mark("r.commit")
        self._execute(
            self._intake.commit_asked(
                session_id,
                commit.transfer_id,
                nonce=commit.nonce,
                epoch=commit.epoch,
                num_frames=commit.num_frames,
                first_token_id=commit.first_token_id,
                now=self._clock(),
            )
        )

    def may_scatter(self, transfer_id: bytes) -> bool:
        return self._intake.may_scatter(transfer_id)

    def frame_ended(
        self, transfer_id: bytes, error: ServingError | None, verified: FrameHeader | None
    ) -> None:
        self._execute(self._intake.frame_ended(transfer_id, error, verified, self._clock()))

    def link_lost(self, session_id: int, reason: FailureReason) -> None:
        self._execute(self._intake.session_lost(session_id, self._clock(), reason))

    # ---- doing what the intake says -------------------------------------------------------------

    def _execute(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case AskBlocks(sequence):
                    self._asking[sequence.transfer_id] = self._spawn(self._ask(sequence))
                case StopAsking(transfer_id):
                    # Not before its first step: it would never say that it has ended.
                    asyncio.get_running_loop().call_soon(self._asking[transfer_id].cancel)
                case Start(sequence, first_token_id):
                    if self._lookout is not None:
                        self._lookout.rest()
                    self._spawn(self._start(sequence, first_token_id))
                case Revoke(session_id):
                    self._spawn(self._revoke(session_id))
                case Free(sequence, num_good_blocks):
                    self._free(sequence, num_good_blocks)
                case ReportFailed(sequence, error, num_good_blocks):
                    self._report_failed(sequence, error, num_good_blocks)
                case ReportWithdrawn(sequence):
                    self._source.on_transfer_withdrawn(sequence.sequence_id)
                case SendTicket() | SendRefused() | SendCommitted() | SendAbort() | SendRenew():
                    self._send(instruction)

    def _report_failed(
        self, sequence: IncomingSequence, error: ServingError, num_good_blocks: int | None
    ) -> None:
        sequence_id, stats = sequence.sequence_id, self.agent.stats
        policy = sequence.kv_load_failure_policy.value
        stats.failures[failure_label(error), policy] += 1
        if num_good_blocks is not None and self._source.may_recompute(sequence_id, num_good_blocks):
            self._recomputing.add(sequence.transfer_id)
            self._intake.taken_over(sequence.transfer_id)
            stats.recomputes[failure_label(error)] += 1
        else:
            self._source.on_transfer_failed(sequence_id, error)

    def _free(self, sequence: IncomingSequence, num_good_blocks: int) -> None:
        if sequence.transfer_id in self._recomputing:
            self._recomputing.discard(sequence.transfer_id)
            self._source.recompute(sequence.sequence_id, num_good_blocks)
        else:
            self._source.release(sequence.sequence_id)

    def _send(
        self, instruction: SendTicket | SendRefused | SendCommitted | SendAbort | SendRenew
    ) -> None:
        session = self._sessions.get(instruction.session_id)
        if session is not None:
            session.send(instruction)

    async def _ask(self, sequence: IncomingSequence) -> None:
        transfer_id = sequence.transfer_id
        try:
            blocks = await self._source.reserve(sequence.request, sequence.gateway_id)
        except asyncio.CancelledError:
            error: ServingError = Cancelled("The reservation is not wanted any more.")
            instructions = self._intake.reserve_failed(transfer_id, error, self._clock())
        except ServingError as refused:
            instructions = self._intake.reserve_failed(transfer_id, refused, self._clock())
        except Exception:  # the top of the task: the sender must hear of it
            logger.exception("blocks could not be reserved")
            error = InternalError("The decode node could not reserve blocks.")
            instructions = self._intake.reserve_failed(transfer_id, error, self._clock())
        else:
            table = tuple(blocks.block_ids)
            self.agent.pool.prepare(table)  # while nobody waits for it
            instructions = self._intake.reserved(
                transfer_id, table, blocks.num_held_blocks, self._clock()
            )
        del self._asking[transfer_id]
        self._execute(instructions)

    async def _start(self, sequence: IncomingSequence, first_token_id: int) -> None:
        transfer_id = sequence.transfer_id
        if TRACE.is_on:
            TRACE.mark("r.start")
        try:
            await self._source.start(sequence.sequence_id, first_token_id)
        except ServingError as error:
            instructions = self._intake.start_failed(transfer_id, error, self._clock())
        except Exception:  # the top of the task: the sender must hear of it
            logger.exception("a sequence could not be started")
            failed = InternalError("The decode node could not start the sequence.")
            instructions = self._intake.start_failed(transfer_id, failed, self._clock())
        else:
            began_at = self._intake.transfers[transfer_id].began_at
            self.agent.stats.transfers_done += 1
            self.agent.stats.transfer_seconds += self._clock() - began_at
            instructions = self._intake.started(transfer_id, self._clock())
        self._execute(instructions)

    async def _revoke(self, session_id: int) -> None:
        session = self._sessions.pop(session_id)
        self.agent.stats.revocations += 1
        try:
            is_revoked = await session.revoke()
        except Exception:  # the top of the task: who knows what still writes
            logger.exception("a connection could not be cut")
            is_revoked = False
        if is_revoked:
            self._execute(self._intake.session_revoked(session_id, self._clock()))
        else:
            self._execute(self._intake.revocation_failed(session_id, self._clock()))
            self.agent.quarantine.keep(
                num_blocks=self._intake.num_blocks_of(session_id),
                num_slots=self.agent.staging.num_owned_by(session_id),
                peer=session.peer.name,
            )

    # ---- helpers --------------------------------------------------------------------------------

    def _on_endpoint(self, session_id: int, endpoint: Endpoint) -> None:
        session = self._sessions.get(session_id)
        if session is None or session.is_connected:
            logger.warning("closed a KV connection that names no session")
            self._spawn(_close(endpoint))
            return
        try:
            session.connected(endpoint)
        except ServingError as error:
            logger.warning("refused prefill node %s: %s", session.peer.name, error.message)
            self._spawn(_close(endpoint))
            self.link_lost(session_id, FailureReason.TRANSPORT_REFUSED)
        else:
            self.agent.stats.pairings += 1

    def _on_messages(self, session_id: int, messages: LocalMessages) -> None:
        session = self._sessions.get(session_id)
        if session is None or not session.sender_slots or session.has_messages:
            logger.warning("closed a connection from this machine that names no session")
            messages.close()
        else:
            session.messages_connected(messages)

    def _peer_name(self, session_id: int) -> str:
        session = self._sessions.get(session_id)
        return "" if session is None else session.peer.name

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _sweep_forever(self) -> None:
        interval = min(MAX_SWEEP_SECONDS, self.agent.config.lease_seconds / 12)
        while True:
            await asyncio.sleep(interval)
            try:
                self.sweep()
            except Exception:  # the top of the task: all other leases and drains hang on it
                logger.exception("a sweep broke off")


async def _close(endpoint: Endpoint) -> None:
    await endpoint.close()


def _draw_nonce() -> int:
    return secrets.randbits(64)
