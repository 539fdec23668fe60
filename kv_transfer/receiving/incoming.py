"""One incoming transfer as the intake sees it: what was promised, what has arrived."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cluster.errors import Cancelled, DeadlineExceeded
from cluster.request import KVLoadFailurePolicy, SequenceRequest
from kv_transfer.digests import digest_seed
from kv_transfer.failures import FailureReason
from kv_transfer.frame_place import at_positions
from kv_transfer.transfer import Ticket, TransferState

if TYPE_CHECKING:
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


class BlockProgress:
    """Which layers of which missing block positions have been announced and verified.

    Of each layer the positions are one integer, a bit for each: a frame takes as many steps as it
    has layers, however many blocks, and no code but the interpreter's own.
    """

    __slots__ = (
        "_announced", "_missing", "_num_announced", "_num_units", "_verified", "num_verified",
    )  # fmt: skip

    def __init__(self, positions: tuple[int, ...], num_layers: int) -> None:
        """`positions` ascending."""
        self._missing = _bits_of(positions)
        self._announced = [0] * num_layers
        self._verified = [0] * num_layers
        self._num_units = len(positions) * num_layers
        self._num_announced = 0
        self.num_verified = 0

    def announce(self, header: FrameHeader) -> bool:
        """False when the frame holds what was not asked for, or what came before."""
        if header.positions[-1] >= self._missing.bit_length():
            return False  # before it makes a large number
        bits, layers = _bits_of(header.positions), _layers(header)
        if bits & ~self._missing or any(self._announced[layer] & bits for layer in layers):
            return False
        for layer in layers:
            self._announced[layer] |= bits
        self._num_announced += header.num_units
        return True

    def verify(self, header: FrameHeader) -> None:
        """What it holds is in the blocks, and its digests were right."""
        bits = _bits_of(header.positions)
        for layer in _layers(header):
            self._verified[layer] |= bits
        self.num_verified += header.num_units

    @property
    def is_announced(self) -> bool:
        """All of it has come, or is about to."""
        return self._num_announced == self._num_units

    @property
    def is_complete(self) -> bool:
        return self.num_verified == self._num_units

    def num_good_blocks(self, num_blocks: int) -> int:
        """Of `num_blocks` of a prompt: those before the first that lacks a verified layer."""
        lacking = 0
        for verified in self._verified:
            lacking |= self._missing & ~verified
        return (lacking & -lacking).bit_length() - 1 if lacking else num_blocks


def _bits_of(positions: tuple[int, ...]) -> int:
    """Ascending ones, which mostly follow each other."""
    if not positions:
        return 0
    begin, end = positions[0], positions[-1] + 1
    if end - begin == len(positions):
        return (1 << end) - (1 << begin)
    return sum(1 << position for position in positions)


def _layers(header: FrameHeader) -> range:
    return range(header.layer_start, header.layer_start + header.num_layers)


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
    progress_at: float  # when a frame or a commit last moved it
    deadline: float | None
    digest_seed: int
    state: TransferState = TransferState.PENDING
    block_ids: tuple[int, ...] = ()
    ids_found: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # of positions, the last asked
    progress: BlockProgress = field(default_factory=lambda: BlockProgress((), 0))
    error: ServingError | None = None
    num_good_blocks: int | None = None  # when it failed, if the node may compute the rest
    is_asking: bool = False  # the block source has not answered yet
    is_starting: bool = False
    is_taken_over: bool = False  # it failed, and the node computes what is missing
    is_doubted: bool = False  # a gateway has lost its sender
    num_arrived: int = 0  # frames whose header came
    num_landing: int = 0
    num_verified: int = 0
    num_committed: int | None = None  # frames, says Commit
    first_token_id: int = 0
    num_to_drain: int | None = None  # frames the peer posted in all, says its ack or abort
    drain_deadline: float | None = None
    forget_at: float | None = None
    is_cut: bool = False  # its connection was revoked: nothing posted on it is left
    is_stuck: bool = False  # its connection was cut, but what was posted on it does not end
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
            progress_at=now,
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
    def waits_for_peer(self) -> bool:
        """What was announced has not come. Between two frames the peer may compute for long."""
        return self.is_receiving and (
            self.num_landing > 0 or self.state is TransferState.COMMITTING
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

    def block_ids_at(self, positions: tuple[int, ...]) -> tuple[int, ...]:
        """Layers of the same blocks follow each other: what was found last is kept."""
        if positions is not self.ids_found[0]:
            self.ids_found = (positions, at_positions(self.block_ids, positions))
        return self.ids_found[1]

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
        self.ids_found = ((), ())
        self.progress = BlockProgress((), 0)
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
