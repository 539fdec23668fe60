"""The decode node of the model: intake, transfers, leases, block manager, reservations and staging
are real; what `KVReceiver` and `ReceiverSession` do between them is said again here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cluster.errors import Cancelled, ServingError
from engine.block_manager import BlockManager
from kv_transfer.digests import PlaceSeal
from kv_transfer.failures import FailureReason, failure
from kv_transfer.protocol import FrameHeader, FrameMalformed, parse_header
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
from kv_transfer.sending.outgoing_instructions import SendAbort as SenderAbort
from kv_transfer.sending.outgoing_instructions import SendAbortAck, SendCommit
from tests.kv_transfer.model.memory import (
    BLOCK_SIZE,
    LIMITS,
    NUM_LAYERS,
    Pool,
    Slots,
    payload_of,
    sealed_of,
    units_of,
)
from tests.kv_transfer.model.prefill import DRAIN_SECONDS, LEASE_SECONDS, STALL_SECONDS
from tests.sequences import make_sequence

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

    from engine.reservation import Reservation
    from engine.sequence import Sequence
    from kv_transfer.receiving.incoming import IncomingSequence
    from kv_transfer.staging import StagingSlot
    from tests.kv_transfer.model.link import Frame, Link

NUM_BLOCKS, NUM_SLOTS = 8, 4


@dataclass(eq=False)
class Arrival:
    """A frame whose header was read; its payload may land at any time."""

    link: Link
    frame: Frame
    header: FrameHeader
    fate: Landing | Dropping
    slot: StagingSlot | None


class ModelDecode:
    def __init__(
        self, loop: asyncio.AbstractEventLoop, incarnation: int, nonces: Iterator[int]
    ) -> None:
        self.incarnation = incarnation
        self.blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.pool = Pool(NUM_BLOCKS)
        self.slots = Slots(NUM_SLOTS, loop)
        self.intake = Intake(
            incarnation=incarnation,
            num_layers=NUM_LAYERS,
            lease_seconds=LEASE_SECONDS,
            drain_seconds=DRAIN_SECONDS,
            stall_seconds=STALL_SECONDS,
            draw_nonce=lambda: next(nonces),
        )
        self.links: dict[int, Link] = {}
        self.revoking: list[Link] = []
        self.stuck: list[Link] = []
        self.asking: dict[bytes, IncomingSequence] = {}
        self.stopped: set[bytes] = set()
        self.starting: dict[bytes, tuple[IncomingSequence, int]] = {}
        self.reservations: dict[bytes, tuple[Sequence, Reservation]] = {}
        self.recomputing: set[bytes] = set()
        self.running: list[Sequence] = []
        self.arrivals: list[Arrival] = []
        self.endings: dict[bytes, list[str]] = {}
        self.started_at: dict[str, float] = {}
        self.is_stalled = False
        self.now = 0.0

    # ---- sessions -----------------------------------------------------------------------------

    def open(self, link: Link, now: float) -> None:
        """A prefill node connects; the session it had before is over."""
        for older in list(self.links.values()):
            self.lose(older, now)
        self.links[link.id] = link
        self.intake.session_opened(link.id)

    def lose(self, link: Link, now: float) -> None:
        self.execute(self.intake.session_lost(link.id, now), now)

    def revoke(self, link: Link, now: float) -> None:
        """The connection is cut; nothing that was posted on it is left."""
        self.revoking.remove(link)
        link.is_cut = True
        for arrival in [each for each in self.arrivals if each.link is link]:
            self._end(arrival, failure(FailureReason.LINK_LOST), None, now)
            arrival.frame.end(failure(FailureReason.LINK_LOST))
        while link.wire:
            link.wire.popleft().end(failure(FailureReason.LINK_LOST))
        self.execute(self.intake.session_revoked(link.id, now), now)

    def fail_to_revoke(self, link: Link, now: float) -> None:
        """It is cut for whatever comes, but payloads already awaited may land for ever."""
        self.revoking.remove(link)
        link.is_cut = True
        self.stuck.append(link)
        while link.wire:
            link.wire.popleft().end(failure(FailureReason.LINK_LOST))
        self.execute(self.intake.revocation_failed(link.id, now), now)

    # ---- frames -------------------------------------------------------------------------------

    def read_header(self, link: Link, now: float) -> bool:
        """Take the next header of a link; False while there is no slot for its payload."""
        if not link.wire or link.id not in self.links:
            return False
        frame = link.wire[0]
        try:
            header = parse_header(memoryview(frame.header), LIMITS)
        except FrameMalformed:
            link.wire.popleft().end(None)
            self.lose(link, now)
            return True
        slot = self.slots.take(link.id)
        if slot is None:
            return False
        link.wire.popleft()
        fate, instructions = self.intake.frame_arrived(link.id, header, now)
        if isinstance(fate, Dropping):
            self.slots.staging.release(slot)
            slot = None
        self.arrivals.append(Arrival(link, frame, header, fate, slot))
        self.execute(instructions, now)
        return True

    def land(self, arrival: Arrival, now: float) -> None:
        """The payload has come: into the blocks, if it is wanted and right."""
        header, fate, slot = arrival.header, arrival.fate, arrival.slot
        error: ServingError | None = failure(FailureReason.ABORTED)
        if isinstance(fate, Landing) and slot is not None:
            assert self.slots.staging.owns(slot), "a write into a slot of somebody else"
            payload_of(slot, header.num_units)[:] = arrival.frame.payload
            if self.intake.may_scatter(header.transfer_id):
                error = self._scatter(header, fate, slot)
        self._end(arrival, error, header if error is None else None, now)
        arrival.frame.end(None)

    def _scatter(
        self,
        header: FrameHeader,
        fate: Landing,
        slot: StagingSlot,
    ) -> ServingError | None:
        units = units_of(slot, header.num_layers, len(header.positions))
        claimed = sealed_of(slot, header.num_layers, len(header.positions))
        seal = PlaceSeal(
            seed=fate.digest_seed,
            layer_start=header.layer_start,
            num_layers=header.num_layers,
            positions=header.positions,
        )
        if not np.array_equal(seal.seal(units), claimed):
            return failure(FailureReason.DIGEST_MISMATCH)
        assert header.transfer_id in self.reservations, "a write into blocks that were given back"
        _, reservation = self.reservations[header.transfer_id]
        for position, block_id in zip(header.positions, fate.block_ids, strict=True):
            assert position >= reservation.num_held_blocks, "a write into a shared block"
            assert reservation.block_ids[position] == block_id, "a write into another block"
        layers = slice(header.layer_start, header.layer_start + header.num_layers)
        self.pool.units[layers, fate.block_ids] = units
        return None

    def _end(
        self, arrival: Arrival, error: ServingError | None, verified: FrameHeader | None, now: float
    ) -> None:
        self.arrivals.remove(arrival)
        if arrival.slot is not None:
            self.slots.staging.release(arrival.slot)
        if isinstance(arrival.fate, Landing) or arrival.fate.is_counted:
            transfer_id = arrival.header.transfer_id
            self.execute(self.intake.frame_ended(transfer_id, error, verified, now), now)

    # ---- the node's part ----------------------------------------------------------------------

    def answer(self, transfer_id: bytes, now: float, *, refuses: bool) -> bool:
        """The queue for blocks: a place, none ever, or not yet (False)."""
        incoming = self.asking[transfer_id]
        if refuses or transfer_id in self.stopped:
            del self.asking[transfer_id]
            if transfer_id not in self.stopped:
                self._ended(transfer_id, "refused")
            error = Cancelled("no place")
            self.execute(self.intake.reserve_failed(transfer_id, error, now), now)
            return True
        sequence = make_sequence(incoming.request.prompt_token_ids, block_size=BLOCK_SIZE)
        reservation = self.blocks.reserve(sequence.block_hashes, sequence.num_tokens)
        if reservation is None:
            return False
        del self.asking[transfer_id]
        self.reservations[transfer_id] = sequence, reservation
        held = reservation.num_held_blocks
        self.execute(self.intake.reserved(transfer_id, reservation.block_ids, held, now), now)
        return True

    def start(self, transfer_id: bytes, now: float, *, fails: bool) -> None:
        incoming, first_token_id = self.starting.pop(transfer_id)
        if fails:
            error = Cancelled("no more")
            self.execute(self.intake.start_failed(transfer_id, error, now), now)
            return
        sequence, reservation = self.reservations.pop(transfer_id)
        self.pool.check(
            sequence.token_ids, reservation.block_ids, range(len(reservation.block_ids))
        )
        sequence.append_token(first_token_id)
        reservation.attach(sequence)
        self._run(sequence, incoming, "started", now)
        self.execute(self.intake.started(transfer_id, now), now)

    def _run(self, sequence: Sequence, incoming: IncomingSequence, how: str, now: float) -> None:
        self._ended(incoming.transfer_id, how)
        self.running.append(sequence)
        name = incoming.sequence_id
        started_at = self.started_at.get(name)
        is_forgotten = started_at is None or now - started_at >= 2 * LEASE_SECONDS
        assert is_forgotten, "a sequence runs twice"
        self.started_at[name] = now

    def _free(self, incoming: IncomingSequence, num_good_blocks: int) -> None:
        transfer_id = incoming.transfer_id
        for arrival in self.arrivals:
            is_its = arrival.header.transfer_id == transfer_id
            assert not (is_its and arrival.slot), "freed while a write may land"
        sequence, reservation = self.reservations.pop(transfer_id)
        if transfer_id not in self.recomputing:
            reservation.cancel()
            return
        self.recomputing.remove(transfer_id)
        self.pool.check(sequence.token_ids, reservation.block_ids, range(num_good_blocks))
        num_computed = min(num_good_blocks * BLOCK_SIZE, sequence.num_tokens - 1)
        reservation.attach(sequence, num_computed_tokens=num_computed)
        first = num_computed // BLOCK_SIZE
        self.pool.compute(
            sequence.token_ids, reservation.block_ids, range(first, len(reservation.block_ids))
        )
        sequence.num_computed_tokens = sequence.num_tokens
        self.blocks.mark_computed(sequence)
        self._run(sequence, incoming, "recomputed", self.now)

    # ---- messages and time --------------------------------------------------------------------

    def hear(self, link: Link, now: float) -> bool:
        if not link.up or link.id not in self.links:
            return False
        match link.up.popleft():
            case (transfer_id, SendCommit(num_frames, first_token_id), ticket):
                self.execute(
                    self.intake.commit_asked(
                        link.id,
                        transfer_id,
                        nonce=ticket.nonce,
                        epoch=ticket.epoch,
                        num_frames=num_frames,
                        first_token_id=first_token_id,
                        now=now,
                    ),
                    now,
                )
            case (transfer_id, SenderAbort(num_posted, error)):
                self.execute(
                    self.intake.sender_aborted(link.id, transfer_id, num_posted, error, now), now
                )
            case (transfer_id, SendAbortAck(epoch, num_posted)):
                self.execute(
                    self.intake.abort_acked(link.id, transfer_id, epoch, num_posted, now), now
                )
            case (transfer_id, seconds):
                self.intake.renewed(link.id, transfer_id, seconds, now)
            case incoming:
                self.execute(self.intake.reserve_asked(link.id, incoming, now), now)
        return True

    def tick(self, now: float) -> None:
        self.execute(self.intake.ticked(now), now)

    def execute(self, instructions: list[Instruction], now: float) -> None:
        self.now = now
        for instruction in instructions:
            match instruction:
                case AskBlocks(sequence):
                    self.asking[sequence.transfer_id] = sequence
                case StopAsking(transfer_id):
                    self.stopped.add(transfer_id)
                case Start(sequence, first_token_id):
                    self.starting[sequence.transfer_id] = sequence, first_token_id
                case Revoke(session_id):
                    self.revoking.append(self.links.pop(session_id))
                case Free(sequence, num_good_blocks):
                    self._free(sequence, num_good_blocks)
                case ReportFailed(sequence, _, num_good_blocks):
                    if num_good_blocks is None:
                        self._ended(sequence.transfer_id, "failed")
                    else:
                        self.recomputing.add(sequence.transfer_id)
                        self.intake.taken_over(sequence.transfer_id)
                case ReportStranded(sequence):
                    self.recomputing.remove(sequence.transfer_id)
                    self._ended(sequence.transfer_id, "failed")
                case ReportWithdrawn(sequence):
                    self._ended(sequence.transfer_id, "withdrawn")
                case SendTicket() | SendRefused() | SendCommitted() | SendAbort() | SendRenew():
                    link = self.links.get(instruction.session_id)
                    if link is not None:
                        link.down.append(instruction)

    def _ended(self, transfer_id: bytes, how: str) -> None:
        self.endings.setdefault(transfer_id, []).append(how)
        assert len(self.endings[transfer_id]) == 1, f"ended twice: {self.endings[transfer_id]}"
