"""The shell around `Intake`: what happens becomes its events, what it answers is done.

Life of a receiver
    1. `start`: the transport listens; a sweep runs every fraction of a lease.
    2. Each prefill node opens a session (`open_session`, called by the gRPC service), then its
       data endpoint. Control messages and frames become events of the intake, and what it
       answers is done here.
    3. A session ends with its stream, its endpoint or a drain that took too long: `revoke`,
       and only when everything of it has ended is the intake told, which frees the blocks.
    4. `close`: every session is revoked.

The rules are in `intake.py`; who is connected, in `sessions.py`; what takes time, in `errands.py`;
what the node is told, in `fates.py`. All methods run on the event loop.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING

from cluster.clock import Clock, monotonic
from cluster.errors import Cancelled, ServingError
from cluster.proto import node_pb2 as pb
from kv_transfer.failures import FailureReason
from kv_transfer.receiving.errands import Errands
from kv_transfer.receiving.fates import Fates
from kv_transfer.receiving.intake import Intake
from kv_transfer.receiving.intake_instructions import (
    AskBlocks,
    Dropping,
    Free,
    Instruction,
    Landing,
    ReportFailed,
    ReportStranded,
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
from kv_transfer.receiving.sessions import Sessions
from kv_transfer.receiving.tasks import Tasks
from kv_transfer.sweeping import sweep_forever
from kv_transfer.trace import TRACE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.node import NodeId
    from kv_transfer.agent import TransferAgent
    from kv_transfer.handshake import Compatibility
    from kv_transfer.protocol import CommitMessage, FrameHeader
    from kv_transfer.receiving.block_source import BlockSource
    from kv_transfer.receiving.incoming import IncomingSequence
    from kv_transfer.receiving.receiver_session import ReceiverSession


# After its ticket a short prompt is computed in a few milliseconds. Not at once: the engine, which
# has just set the blocks aside, still seems to be busy.
_TICKET_SECONDS = 0.001


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
        rehearse_start: Callable[[], None] = lambda: None,
        clock: Clock = monotonic,
    ) -> None:
        """`is_decoding`: of a node that decodes, whether reads would hold up what it computes, and
        whether it has the time to stay awake for them. `rehearse_start`: a sequence starts soon,
        maybe."""
        self.node_id = node_id
        self.agent = agent
        self._clock = clock
        self._sweeping: asyncio.Task[None] | None = None
        config = agent.config
        self._intake = Intake(
            incarnation=node_id.incarnation,
            num_layers=agent.pool.num_layers,
            lease_seconds=config.lease_seconds,
            drain_seconds=config.drain_seconds,
            stall_seconds=config.stall_seconds,
            draw_nonce=lambda: secrets.randbits(64),
        )
        self.pace = ReadPace(
            config.receive_bytes_per_second, patience_seconds=config.patience_seconds
        )
        self._lookout: Lookout | None = None
        if is_decoding is not None:
            self._lookout = Lookout(is_decoding, agent.pool.rehearse_arrival, rehearse_start)
            agent.pool.is_decoding = is_decoding
        self._reads = PacedReads(
            self.pace,
            is_wanted=self.may_scatter,
            is_decoding=is_decoding or (lambda: False),
            clock=clock,
            stats=agent.stats,
        )
        self._tasks = Tasks()
        self._sessions = Sessions(agent, compatibility, self, self._reads, self._tasks)
        self._fates = Fates(source, self._intake, agent.stats)
        self._errands = Errands(
            agent, source, self._intake, self._sessions, self._tasks, self._execute, clock
        )

    @property
    def data_port(self) -> int:
        return self.agent.transport.port

    @property
    def messages_at(self) -> bytes:
        """Where senders on this machine connect for messages, if their slots are mapped here."""
        return self._sessions.messages_at

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
        return self._sessions.connected_with(name)

    async def start(self) -> None:
        await self._sessions.listen()
        self._sweeping = asyncio.create_task(sweep_forever(self, self.agent.config.lease_seconds))

    async def close(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._sessions.close()
        await self._tasks.ended()

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
                peer=self._sessions.peer_name(transfer.session_id),
                state=transfer.state.value,
                num_blocks=len(transfer.block_ids),
                expires_in_seconds=self._intake.remaining_seconds(transfer.transfer_id, now),
            )
            for transfer in self._intake.transfers
        ]

    def sweep(self) -> None:
        """Act on what time alone has changed. Runs on a timer; tests call it."""
        now = self._clock()
        self._execute(self._intake.ticked(now))
        for session in self._sessions:
            if session.is_silent(now):
                self.link_lost(session.id, FailureReason.LINK_LOST)

    # ---- what a peer says (through the gRPC service) ----------------------------------------

    def open_session(self, peer: NodeId, theirs: Compatibility) -> ReceiverSession:
        """Raises what `Sessions.open` does."""
        session = self._sessions.open(peer, theirs)
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
        session.told_posted(renew.num_posted)
        self._intake.renewed(session.id, renew.transfer_id, renew.extend_seconds, self._clock())

    # ---- what a session's frames say ----------------------------------------------------------

    def frame_arrived(self, session_id: int, header: FrameHeader) -> Landing | Dropping:
        fate, instructions = self._intake.frame_arrived(session_id, header, self._clock())
        self._execute(instructions)
        if header.slot is not None:
            self._stay_awake()
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
        if verified is not None and verified.slot is not None and self._lookout is not None:
            self._lookout.placed()

    def link_lost(self, session_id: int, reason: FailureReason) -> None:
        self._execute(self._intake.session_lost(session_id, self._clock(), reason))

    # ---- doing what the intake says -------------------------------------------------------------

    def _execute(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case AskBlocks(sequence):
                    self._errands.ask(sequence)
                case StopAsking(transfer_id):
                    self._errands.stop_asking(transfer_id)
                case Start(sequence, first_token_id):
                    if self._lookout is not None:
                        self._lookout.rest()
                    self._errands.start(sequence, first_token_id)
                case Revoke(session_id):
                    self._errands.revoke(session_id)
                case Free(sequence, num_good_blocks):
                    self._fates.free(sequence, num_good_blocks)
                case ReportFailed(sequence, error, num_good_blocks):
                    self._fates.failed(sequence, error, num_good_blocks)
                case ReportStranded(sequence, error):
                    self._fates.stranded(sequence, error)
                case ReportWithdrawn(sequence):
                    self._fates.withdrawn(sequence)
                case SendTicket() | SendRefused() | SendCommitted() | SendAbort() | SendRenew():
                    self._say(instruction)

    def _say(
        self, instruction: SendTicket | SendRefused | SendCommitted | SendAbort | SendRenew
    ) -> None:
        session = self._sessions.find(instruction.session_id)
        if session is None:
            return
        session.send(instruction)
        if isinstance(instruction, SendTicket) and session.sender_slots:
            loop = asyncio.get_running_loop()
            loop.call_later(_TICKET_SECONDS, self._stay_awake)

    def _stay_awake(self) -> None:
        """From one GPU to another all is a matter of microseconds."""
        if self._lookout is not None:
            self._lookout.stay()
