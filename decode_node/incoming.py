"""One incoming transfer as the intake sees it: what was promised, what has arrived."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cluster.errors import Cancelled, DeadlineExceeded
from cluster.request import KVLoadFailurePolicy, SequenceRequest
from kv_transfer.digests import digest_seed
from kv_transfer.failures import FailureReason
from kv_transfer.transfer import Ticket, TransferState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.errors import ServingError
    from kv_transfer.protocol import FrameHeader


EPOCH_MASK = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class IncomingSequence:
    """What a `Reserve` asks for."""

    transfer_id: bytes
    attempt: int
    request: SequenceRequest
    gateway_id: str
    kv_load_failure_policy: KVLoadFailurePolicy = KVLoadFailurePolicy.FAIL

    @property
    def sequence_id(self) -> str:
        return self.request.sequence_id


@dataclass(slots=True)
class BlockProgress:
    """Which layers of which missing block positions have been announced and verified."""

    num_layers: int
    num_units: int  # to receive in all
    announced: dict[int, int]  # position -> bit set of its layers
    verified: dict[int, int]  # likewise
    num_verified: int = 0

    @classmethod
    def of(cls, positions: Sequence[int], num_layers: int) -> BlockProgress:
        none = dict.fromkeys(positions, 0)
        return cls(num_layers, num_layers * len(positions), none, dict(none))

    def announce(self, header: FrameHeader) -> bool:
        """False when the frame holds what was not asked for, or what came before."""
        layers = _layers(header)
        for position in header.positions:
            if self.announced.get(position, layers) & layers:
                return False
        for position in header.positions:
            self.announced[position] |= layers
        return True

    def verify(self, header: FrameHeader) -> None:
        """What it holds is in the blocks, and its digests were right."""
        layers = _layers(header)
        for position in header.positions:
            self.verified[position] |= layers
        self.num_verified += header.num_layers * len(header.positions)

    @property
    def is_complete(self) -> bool:
        return self.num_verified == self.num_units

    def num_good_blocks(self, num_blocks: int) -> int:
        """Of `num_blocks` of a prompt: those before the first that lacks a verified layer."""
        every_layer = (1 << self.num_layers) - 1
        lacking = (p for p, layers in self.verified.items() if layers != every_layer)
        return min(lacking, default=num_blocks)


def _layers(header: FrameHeader) -> int:
    """Its layers as a bit set."""
    return ((1 << header.num_layers) - 1) << header.layer_start


@dataclass(slots=True)
class IncomingTransfer:
    """State of one transfer. Only `Intake` changes it.

    A frame is `landing` from the moment its payload may be written into a slot until it was
    scattered into the blocks or dropped: while any is, the blocks must not be freed.
    """

    sequence: IncomingSequence
    session_id: int
    epoch: int
    nonce: int
    began_at: float
    deadline: float | None
    digest_seed: int
    state: TransferState = TransferState.PENDING
    block_ids: tuple[int, ...] = ()
    progress: BlockProgress = field(default_factory=lambda: BlockProgress.of((), 0))
    error: ServingError | None = None
    num_good_blocks: int | None = None  # when it failed, if the node may compute the rest
    is_asking: bool = False  # the block source has not answered yet
    is_starting: bool = False
    num_arrived: int = 0  # frames whose header came
    num_landing: int = 0
    num_verified: int = 0
    num_committed: int | None = None  # frames, says Commit
    first_token_id: int = 0
    num_to_drain: int | None = None  # frames the peer posted in all, says its ack or abort
    drain_deadline: float | None = None
    forget_at: float | None = None
    is_cut: bool = False  # its connection was revoked: nothing posted on it is left
    is_waiting_for: set[bytes] = field(default_factory=set)  # older attempts not yet freed

    @classmethod
    def begin(
        cls, sequence: IncomingSequence, session_id: int, *, epoch: int, nonce: int, now: float
    ) -> IncomingTransfer:
        seconds = sequence.request.deadline_seconds
        return cls(
            sequence=sequence,
            session_id=session_id,
            epoch=epoch,
            nonce=nonce,
            began_at=now,
            deadline=None if seconds is None else now + seconds,
            digest_seed=digest_seed(sequence.transfer_id, sequence.request.cache_salt),
        )

    @property
    def transfer_id(self) -> bytes:
        return self.sequence.transfer_id

    @property
    def abort_epoch(self) -> int:
        """The epoch after the ticket's: an abort's, and that of its acknowledgement."""
        return (self.epoch + 1) & EPOCH_MASK

    @property
    def is_receiving(self) -> bool:
        """Its frames are wanted."""
        return self.state in (TransferState.ACTIVE, TransferState.COMMITTING) and (
            not self.is_starting
        )

    @property
    def is_quiescent(self) -> bool:
        """Nothing writes into its blocks, now or later: every frame the peer posted has come
        and gone, or the connection that could bring one is cut."""
        if self.is_asking or self.num_landing:
            return False
        return self.is_cut or (
            self.num_to_drain is not None and self.num_arrived >= self.num_to_drain
        )

    def num_good_blocks_after(self, error: ServingError) -> int | None:
        """How many leading blocks are right, if what is missing may be computed here instead of
        failing with `error`; None if not: nobody wants the sequence, or it has no blocks."""
        is_allowed = self.sequence.kv_load_failure_policy is KVLoadFailurePolicy.RECOMPUTE
        is_wanted = not isinstance(error, Cancelled | DeadlineExceeded)
        if not (is_allowed and is_wanted and self.block_ids):
            return None
        return self.progress.num_good_blocks(len(self.block_ids))

    def bury(self, forget_at: float) -> None:
        """Keep only what a late message may ask for."""
        self.forget_at = forget_at
        self.block_ids = ()
        self.progress = BlockProgress.of((), 0)
        request = replace(self.sequence.request, prompt_token_ids=())
        self.sequence = replace(self.sequence, request=request)

    def ticket(
        self, incarnation: int, missing: tuple[int, ...], *, expires_in_seconds: float
    ) -> Ticket:
        return Ticket(
            transfer_id=self.transfer_id,
            incarnation=incarnation,
            epoch=self.epoch,
            nonce=self.nonce,
            expires_in_seconds=expires_in_seconds,
            missing_positions=missing,
        )

    def why_not_ours(self, header: FrameHeader, incarnation: int) -> FailureReason | None:
        """Why a frame that names this transfer is none of its own; None when it is."""
        if self.state.is_final:
            return FailureReason.ABORTED
        ticket = (header.incarnation, header.epoch, header.nonce)
        if ticket != (incarnation, self.epoch, self.nonce):
            return FailureReason.TICKET_INVALID
        return FailureReason.FRAME_DUPLICATE if header.seq < self.num_arrived else None

    def announce(self, header: FrameHeader) -> FailureReason | None:
        """Count one of its own frames as landing; why it is not what the ticket allows."""
        is_next = header.seq == self.num_arrived
        self.num_arrived += 1
        self.num_landing += 1
        if not is_next:
            return FailureReason.FRAME_LOST
        is_late = self.num_committed is not None and self.num_arrived > self.num_committed
        if is_late or not self.progress.announce(header):
            return FailureReason.FRAME_UNEXPECTED
        return None
