"""A prefill node, a link and a block source around one `Intake`, stepped by a test.

The world knows what really happens to memory: which frames the peer has posted, which have
arrived, which are being written into blocks. It fails the moment the intake frees blocks that
something may still write into, starts twice, or reports two endings.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.errors import Cancelled, ServingError, TransferFailed
from cluster.request import SamplingParams, SequenceRequest
from kv_transfer.failures import FailureReason, failure
from kv_transfer.protocol import FrameHeader
from kv_transfer.receiving.endings import DOUBT_SECONDS
from kv_transfer.receiving.incoming import IncomingSequence
from kv_transfer.receiving.intake import Intake
from kv_transfer.receiving.intake_instructions import (
    AskBlocks,
    Free,
    Instruction,
    Landing,
    ReportFailed,
    ReportWithdrawn,
    Revoke,
    SendAbort,
    SendCommitted,
    SendRefused,
    SendTicket,
    Start,
    StopAsking,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from kv_transfer.transfer import Ticket

NUM_LAYERS = 2
INCARNATION = 77
SESSION = 5
LEASE_SECONDS = 30.0
DRAIN_SECONDS = 1.0
STALL_SECONDS = 60.0


def make_sequence(
    name: str = "s", *, transfer: int = 1, attempt: int = 1, deadline: float | None = None
) -> IncomingSequence:
    request = SequenceRequest(
        sequence_id=name,
        request_id=name,
        prompt_token_ids=(1, 2, 3, 4),
        sampling=SamplingParams(max_tokens=4, seed=0),
        deadline_seconds=deadline,
    )
    return IncomingSequence(
        transfer_id=bytes([transfer]) * 16, attempt=attempt, request=request, gateway_id="g"
    )


def make_intake() -> Intake:
    nonces = iter(range(100, 10_000))
    return Intake(
        incarnation=INCARNATION,
        num_layers=NUM_LAYERS,
        lease_seconds=LEASE_SECONDS,
        drain_seconds=DRAIN_SECONDS,
        stall_seconds=STALL_SECONDS,
        draw_nonce=lambda: next(nonces),
    )


def make_header(
    ticket: Ticket, seq: int, positions: tuple[int, ...], **changes: int
) -> FrameHeader:
    fields = {
        "incarnation": ticket.incarnation,
        "epoch": ticket.epoch,
        "nonce": ticket.nonce,
        "layer_start": 0,
        "num_layers": NUM_LAYERS,
        **changes,
    }
    return FrameHeader(
        transfer_id=ticket.transfer_id,
        seq=seq,
        positions=positions,
        payload_bytes=0,
        **fields,  # type: ignore[arg-type]
    )


@dataclass
class Side:
    """One transfer, as the peer, the link and the block source know it."""

    sequence: IncomingSequence
    session: int = SESSION
    ticket: Ticket | None = None
    is_asking: bool = False
    holds_blocks: bool = False
    num_posted: int = 0
    num_arrived: int = 0
    landing: list[bool] = field(default_factory=list)  # per arrived frame that has not ended
    has_stopped: bool = False  # the peer posts no more
    abort_epoch: int | None = None
    is_starting: bool = False
    num_starts: int = 0
    num_freed: int = 0
    endings: list[str] = field(default_factory=list)

    @property
    def may_be_written(self) -> bool:
        return self.num_arrived < self.num_posted or any(self.landing)


class IntakeWorld:
    """`num_frames` frames of one block each, for every sequence."""

    def __init__(self, *sequences: IncomingSequence, num_frames: int = 1) -> None:
        self.now = 0.0
        self.intake = make_intake()
        self.intake.session_opened(SESSION)
        self.num_frames = num_frames
        self.is_lost = False
        self.is_revoking = False
        self.is_cut = False
        self.sent: list[Instruction] = []
        self.sides: dict[bytes, Side] = {}
        for sequence in sequences or (make_sequence(),):
            self.sides[sequence.transfer_id] = Side(sequence)
            self.run(self.intake.reserve_asked(SESSION, sequence, self.now))

    @property
    def side(self) -> Side:
        return next(iter(self.sides.values()))

    # ---- what the intake says ---------------------------------------------------------------

    def run(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            self.sent.append(instruction)
            match instruction:
                case AskBlocks(sequence):
                    self.sides[sequence.transfer_id].is_asking = True
                case SendTicket(_, ticket):
                    self.sides[ticket.transfer_id].ticket = ticket
                case SendAbort(_, transfer_id, epoch, _):
                    self.sides[transfer_id].abort_epoch = epoch
                case SendRefused(_, transfer_id, _):
                    self.sides[transfer_id].has_stopped = True
                case Start(sequence, _):
                    side = self.sides[sequence.transfer_id]
                    side.is_starting = True
                    side.num_starts += 1
                    assert side.num_starts == 1, "started twice"
                    assert not side.may_be_written, "started while a write may land"
                case Free(sequence):
                    self._freed(self.sides[sequence.transfer_id])
                case ReportFailed(sequence, _):
                    self._ended(sequence, "failed")
                case ReportWithdrawn(sequence):
                    self._ended(sequence, "withdrawn")
                case Revoke():
                    assert not self.is_revoking, "revoked twice"
                    self.is_revoking = True
                case _:
                    pass

    def _freed(self, side: Side) -> None:
        side.num_freed += 1
        assert side.holds_blocks, "freed blocks that were not held"
        assert side.num_freed == 1, "freed twice"
        assert self.is_cut or not side.may_be_written, "freed while a write may land"
        assert self.is_cut or side.has_stopped, "freed while the peer may still post"
        side.holds_blocks = False

    def _ended(self, sequence: IncomingSequence, how: str) -> None:
        side = self.sides[sequence.transfer_id]
        side.endings.append(how)
        assert len(side.endings) == 1, f"ended twice: {side.endings}"

    # ---- what may happen next ---------------------------------------------------------------

    def possible(self) -> dict[str, Callable[[], None]]:
        steps: dict[str, Callable[[], None]] = {
            "expire": lambda: self.tick(LEASE_SECONDS),
            "drain": lambda: self.tick(DRAIN_SECONDS),
            "still": lambda: self.tick(DOUBT_SECONDS),
        }
        if not self.is_lost:
            steps["lose"] = self.lose
        if self.is_revoking and not self.is_cut:
            steps["cut"] = self.cut
        for index, side in enumerate(self.sides.values()):
            for name, step in self._of(side).items():
                steps[name if index == 0 else f"{name}/{index}"] = step
        return steps

    def _of(self, side: Side) -> dict[str, Callable[[], None]]:
        steps: dict[str, Callable[[], None]] = {
            "cancel": lambda: self.cancel(side),
            "doubt": lambda: self.doubt(side),
        }
        if side.is_asking:
            steps["answer"] = lambda: self.answer(side)
            steps["full"] = lambda: self.refuse(side)
        if side.is_starting:
            steps["started"] = lambda: self.started(side)
            steps["unstarted"] = lambda: self.started(side, Cancelled("no"))
        if self.is_cut:
            return steps
        if side.num_arrived < side.num_posted:
            steps[f"arrive{side.num_arrived}"] = lambda: self.arrive(side)
        for index, is_landing in enumerate(side.landing):
            if is_landing:
                bad = failure(FailureReason.DIGEST_MISMATCH)
                steps[f"end{index}"] = functools.partial(self.end, side, index)
                steps[f"bad{index}"] = functools.partial(self.end, side, index, bad)
        if not self.is_lost:
            steps.update(self._of_peer(side))
        return steps

    def _of_peer(self, side: Side) -> dict[str, Callable[[], None]]:
        steps: dict[str, Callable[[], None]] = {}
        steps["withdraw"] = lambda: self.withdraw(side, None)
        steps["fail"] = lambda: self.withdraw(side, TransferFailed("broken"))
        if not side.has_stopped:
            if side.ticket is not None and side.num_posted < self.num_frames:
                steps[f"post{side.num_posted}"] = lambda: self.post(side)
            if side.ticket is not None and side.num_posted == self.num_frames:
                steps["commit"] = lambda: self.commit(side)
        if side.abort_epoch is not None:
            steps["ack"] = lambda: self.ack(side)
        return steps

    # ---- steps ------------------------------------------------------------------------------

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.run(self.intake.ticked(self.now))

    def lose(self) -> None:
        self.is_lost = True
        for side in self.sides.values():
            side.has_stopped = True
        self.run(self.intake.session_lost(SESSION, self.now))

    def cut(self) -> None:
        """The shell's promise: every frame has ended before the intake hears of the cut."""
        self.is_lost = True
        for side in self.sides.values():
            for index, is_landing in enumerate(side.landing):
                if is_landing:
                    self.end(side, index, failure(FailureReason.LINK_LOST))
            side.num_posted = side.num_arrived
        self.is_cut = True
        self.run(self.intake.session_revoked(SESSION, self.now))

    def answer(self, side: Side) -> None:
        side.is_asking = False
        side.holds_blocks = True
        blocks = tuple(range(self.num_frames))
        self.run(self.intake.reserved(side.sequence.transfer_id, blocks, 0, self.now))

    def refuse(self, side: Side) -> None:
        """The block source gives up, by itself or because it was told to."""
        side.is_asking = False
        was_stopped = StopAsking(side.sequence.transfer_id) in self.sent
        if not was_stopped:
            self._ended(side.sequence, "refused")
        error = Cancelled("stopped")
        self.run(self.intake.reserve_failed(side.sequence.transfer_id, error, self.now))

    def post(self, side: Side) -> None:
        side.num_posted += 1

    def arrive(self, side: Side) -> None:
        assert side.ticket is not None
        header = make_header(side.ticket, side.num_arrived, (side.num_arrived,))
        side.num_arrived += 1
        side.landing.append(True)
        fate, instructions = self.intake.frame_arrived(SESSION, header, self.now)
        if isinstance(fate, Landing):
            assert side.holds_blocks, "lands in blocks that are not held"
        self.run(instructions)

    def end(self, side: Side, index: int, error: ServingError | None = None) -> None:
        side.landing[index] = False
        assert side.ticket is not None
        verified = None if error else make_header(side.ticket, index, (index,))
        transfer_id = side.sequence.transfer_id
        self.run(self.intake.frame_ended(transfer_id, error, verified, self.now))

    def commit(self, side: Side) -> None:
        assert side.ticket is not None
        side.has_stopped = True
        self.run(
            self.intake.commit_asked(
                SESSION,
                side.sequence.transfer_id,
                nonce=side.ticket.nonce,
                epoch=side.ticket.epoch,
                num_frames=side.num_posted,
                first_token_id=9,
                now=self.now,
            )
        )

    def started(self, side: Side, error: ServingError | None = None) -> None:
        side.is_starting = False
        transfer_id = side.sequence.transfer_id
        if error is not None:
            self.run(self.intake.start_failed(transfer_id, error, self.now))
            return
        side.holds_blocks = False
        self._ended(side.sequence, "started")
        self.run(self.intake.started(transfer_id, self.now))

    def withdraw(self, side: Side, error: ServingError | None) -> None:
        side.has_stopped = True
        transfer_id = side.sequence.transfer_id
        self.run(self.intake.sender_aborted(SESSION, transfer_id, side.num_posted, error, self.now))

    def ack(self, side: Side) -> None:
        assert side.abort_epoch is not None
        side.has_stopped = True
        transfer_id, epoch = side.sequence.transfer_id, side.abort_epoch
        self.run(self.intake.abort_acked(SESSION, transfer_id, epoch, side.num_posted, self.now))

    def cancel(self, side: Side) -> None:
        self.run(self.intake.cancelled(side.sequence.sequence_id, Cancelled("left"), self.now))

    def doubt(self, side: Side) -> None:
        self.run(self.intake.sender_doubted(side.sequence.sequence_id, self.now))

    # ---- the end ----------------------------------------------------------------------------

    def finish(self) -> None:
        """Everything under way ends; time passes; then nothing may be held by anyone."""
        self._let_it_end()
        if self.intake.transfers.num_active:
            self.tick(LEASE_SECONDS)
            self._let_it_end()
            self.tick(DRAIN_SECONDS)
            self._let_it_end()
        for side in self.sides.values():
            assert not side.holds_blocks, "blocks are held for ever"
            assert len(side.endings) == 1, f"{len(side.endings)} endings"
        assert self.intake.transfers.num_active == 0
        assert self.intake.transfers.num_quarantined_blocks == 0
        committed = [sent for sent in self.sent if isinstance(sent, SendCommitted)]
        assert len(committed) <= len(self.sides)

    def _let_it_end(self) -> None:
        """Answers, frames in flight, acks and cuts come; the peer does nothing new."""
        moving = ("answer", "arrive", "end", "started", "ack", "cut")
        for _ in range(100):
            steps = self.possible()
            names = [n for n in steps if n.split("/")[0].rstrip("0123456789") in moving]
            names = [n for n in names if not n.startswith("ack") or not self._acked(n)]
            if not names:
                return
            steps[names[0]]()
        raise AssertionError("it never ends")

    def _acked(self, name: str) -> bool:
        """An acknowledgement is given once."""
        index = int(name.partition("/")[2] or 0)
        side = list(self.sides.values())[index]
        if side.abort_epoch is None:
            return True
        was_acked = getattr(side, "_acked", False)
        side._acked = True  # type: ignore[attr-defined]
        return was_acked


def reserved_world(*, num_frames: int = 1) -> IntakeWorld:
    """Its blocks are set aside, the ticket is out."""
    world = IntakeWorld(num_frames=num_frames)
    world.answer(world.side)
    return world


def of_kind(world: IntakeWorld, kind: type) -> list[Any]:
    """What the intake said of this kind."""
    return [sent for sent in world.sent if isinstance(sent, kind)]
