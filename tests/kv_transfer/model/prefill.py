"""The prefill node of the model: block manager, holds, staging, leases and outgoing transfers are
real; what `KVSender` and `Peer` do between them is said again here, one step a method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.block_manager import BlockManager
from kv_transfer.digests import PlaceSeal, digest_seed
from kv_transfer.failures import FailureReason, failure
from kv_transfer.lease import LeaseTable
from kv_transfer.protocol import FrameHeader
from kv_transfer.receiving.intake_instructions import (
    SendAbort as ReceiverAbort,
)
from kv_transfer.receiving.intake_instructions import (
    SendCommitted,
    SendRefused,
    SendRenew,
    SendTicket,
)
from kv_transfer.sending.outgoing import FramePlan, Instruction, OutgoingTransfer
from kv_transfer.sending.outgoing_instructions import (
    FreeSources,
    ReportCommitted,
    ReportFailed,
    SendAbort,
    SendAbortAck,
    SendCommit,
)
from tests.kv_transfer.model.link import Frame, Link
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

if TYPE_CHECKING:
    import asyncio

    from cluster.errors import ServingError
    from engine.reservation import Hold
    from engine.sequence import Sequence
    from kv_transfer.receiving.incoming import IncomingSequence
    from kv_transfer.staging import StagingSlot

NUM_BLOCKS, NUM_SLOTS = 8, 3
LEASE_SECONDS = 30.0
DRAIN_SECONDS = 1.0
STALL_SECONDS = 20.0
FIRST_TOKEN = 7


@dataclass(eq=False)
class Sending:
    incoming: IncomingSequence
    sequence: Sequence
    machine: OutgoingTransfer
    link: Link
    progress_at: float
    holds: list[Hold] = field(default_factory=list)
    packed: list[tuple[FramePlan, StagingSlot]] = field(default_factory=list)
    num_in_flight: int = 0
    endings: list[str] = field(default_factory=list)
    is_freed: bool = False

    @property
    def id(self) -> bytes:
        return self.incoming.transfer_id


class ModelPrefill:
    def __init__(self, loop: asyncio.AbstractEventLoop, *, is_eager: bool) -> None:
        self.is_eager = is_eager
        self.blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.pool = Pool(NUM_BLOCKS)
        self.slots = Slots(NUM_SLOTS, loop)
        self.leases = LeaseTable(LEASE_SECONDS)
        self.link: Link | None = None
        self.sendings: dict[bytes, Sending] = {}
        self.ended: dict[bytes, Sending] = {}
        self.is_stalled = False

    # ---- what the node does -----------------------------------------------------------------

    def open(self, incoming: IncomingSequence, sequence: Sequence, link: Link, now: float) -> bool:
        """Schedule a prompt and reserve for it. False when it finds no blocks here."""
        if not self.blocks.allocate(sequence, sequence.num_tokens):
            return False
        num_blocks = self.blocks.num_blocks_for(sequence.num_tokens)
        machine = OutgoingTransfer(num_layers=NUM_LAYERS, num_blocks=num_blocks)
        sending = Sending(incoming, sequence, machine, link, now)
        self.sendings[sending.id] = sending
        self.leases.grant(sending.id, now)
        link.up.append(incoming)
        return True

    def compute(self, sending: Sending) -> bool:
        """One more chunk of two tokens. With the last comes the first token, and the scheduler lets
        go of the sequence."""
        sequence = sending.sequence
        if not sequence.block_table or sequence.num_computed_tokens >= sequence.num_tokens:
            return False
        begin = sequence.num_computed_tokens
        end = min(begin + BLOCK_SIZE, sequence.num_tokens)
        table, num_blocks = sequence.block_table, self.blocks.num_blocks_for(end)
        self.pool.compute(sequence.token_ids, table, range(begin // BLOCK_SIZE, num_blocks))
        held = sum(len(hold.block_ids) for hold in sending.holds)
        if num_blocks > held and not sending.is_freed:
            hold = self.blocks.hold(table[held:num_blocks], "transfer")
            sending.holds.append(hold)
        sequence.num_computed_tokens = end
        self.blocks.mark_computed(sequence)
        if not sending.is_freed:
            complete = num_blocks if end == sequence.num_tokens else end // BLOCK_SIZE
            sending.machine.chunk_computed(complete, table, None)
        if end == sequence.num_tokens:
            self.did(sending, sending.machine.commit_asked(FIRST_TOKEN))
            self.blocks.free(sequence)
        return True

    def withdraw(self, sending: Sending) -> None:
        if not sending.endings:
            sending.endings.append("withdrawn")
        self.blocks.free(sending.sequence)
        self.did(sending, sending.machine.withdrawn())

    # ---- frames -------------------------------------------------------------------------------

    def pack(self, sending: Sending) -> bool:
        """Plan a frame and copy its blocks into a slot."""
        if not sending.machine.has_frame or sending.link.is_noticed:
            return False
        slot = self.slots.take(sending.link)
        if slot is None:
            return False
        plan = sending.machine.next_frame(4)
        assert plan is not None
        units = units_of(slot, plan.num_layers, len(plan.positions))
        layers = slice(plan.layer_start, plan.layer_start + plan.num_layers)
        units[:] = self.pool.units[layers][:, list(plan.block_ids)]
        sealed = sealed_of(slot, plan.num_layers, len(plan.positions))
        sealed[:] = _seal_of(sending, plan).seal(units)
        table = dict(zip(plan.positions, plan.block_ids, strict=True))
        for position in plan.positions:
            tokens = sending.sequence.token_ids
            self.pool.check(tokens, [table.get(i, 0) for i in range(position + 1)], _one(position))
        sending.packed.append((plan, slot))
        return True

    def post(self, sending: Sending, now: float) -> bool:
        if not sending.packed:
            return False
        plan, slot = sending.packed.pop(0)
        assert self.slots.staging.owns(slot), "a slot of somebody else"
        if not self._may_post(sending, now):
            self.slots.staging.release(slot)
            self.did(sending, sending.machine.dropped())
            return True
        seq, instructions = sending.machine.posted()
        sending.num_in_flight += 1
        header = self._header(sending, plan, seq)
        frame = Frame.of(header, payload_of(slot, header.num_units))

        def settle(error: ServingError | None) -> None:
            assert self.slots.staging.owns(slot), "a slot was given away while it was sent"
            self.slots.staging.release(slot)
            sending.num_in_flight -= 1
            sending.progress_at = now
            self.did(sending, sending.machine.settled(error))

        frame.settle = settle
        self.did(sending, instructions)
        if sending.link.is_cut:
            frame.end(failure(FailureReason.LINK_LOST))
        else:
            sending.link.wire.append(frame)
            if self.is_eager:
                frame.end(None)
        return True

    def fail_to_pack(self, sending: Sending) -> None:
        """A frame turns out to be none. It is dropped when the device has ended, which is later."""
        if self.pack(sending):
            self.did(sending, sending.machine.failed(failure(FailureReason.INTERNAL)))

    def _may_post(self, sending: Sending, now: float) -> bool:
        if not sending.machine.may_post:
            return False
        if self.leases.is_live(sending.id, now):
            return True
        self._end(sending, FailureReason.LEASE_EXPIRED)
        return False

    def _header(
        self,
        sending: Sending,
        plan: FramePlan,
        seq: int,
    ) -> FrameHeader:
        ticket = sending.machine.ticket
        assert ticket is not None
        return FrameHeader(
            transfer_id=sending.id,
            incarnation=ticket.incarnation,
            epoch=ticket.epoch,
            nonce=ticket.nonce,
            seq=seq,
            layer_start=plan.layer_start,
            num_layers=plan.num_layers,
            positions=plan.positions,
            payload_bytes=LIMITS.payload_bytes(plan.num_layers * len(plan.positions)),
        )

    # ---- messages and time --------------------------------------------------------------------

    def hear(self, link: Link, now: float) -> bool:
        if not link.down:
            return False
        message = link.down.popleft()
        transfer_id = (
            message.ticket.transfer_id if isinstance(message, SendTicket) else message.transfer_id
        )
        sending = self.sendings.get(transfer_id)
        match message:
            case ReceiverAbort(_, _, epoch, error):
                if sending is not None:
                    self.did(sending, sending.machine.abort_asked(epoch, error))
                elif transfer_id in self.ended:
                    num_posted = self.ended[transfer_id].machine.num_posted
                    link.up.append((transfer_id, SendAbortAck(epoch, num_posted)))
            case _ if sending is None:
                pass
            case SendTicket(_, ticket):
                self.did(sending, sending.machine.ticketed(ticket))
            case SendRefused(_, _, error):
                self.did(sending, sending.machine.refused(error))
            case SendCommitted(_, _, maybe):
                self.did(sending, sending.machine.committed(maybe))
            case SendRenew(_, _, seconds):
                self.leases.renew(transfer_id, seconds, now)
        return True

    def notice(self, link: Link) -> None:
        """The stream has ended: so has all that runs over it."""
        link.is_noticed = True
        if self.link is link:
            self.link = None
        for sending in self._of(link):
            self.did(sending, sending.machine.peer_lost(failure(FailureReason.RECEIVER_LOST)))
        link.up.clear()

    def sweep(self, now: float) -> list[Link]:
        """Links to cut: their sends do not end."""
        for transfer_id in self.leases.expire(now):
            self._end(self.sendings[transfer_id], FailureReason.LEASE_EXPIRED)
        cut = []
        for sending in list(self.sendings.values()):
            seconds = now - sending.progress_at
            if sending.machine.is_draining and sending.num_in_flight and seconds >= DRAIN_SECONDS:
                cut.append(sending.link)
            elif sending.machine.waits_for_peer and seconds >= STALL_SECONDS:
                self._end(sending, FailureReason.TRANSFER_TIMEOUT)
        for transfer_id in self.leases.due_renewals(now):
            link = self.sendings[transfer_id].link
            link.up.append((transfer_id, self.leases.extension_seconds))
        return cut

    def did(self, sending: Sending, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case SendCommit():
                    ticket = sending.machine.ticket
                    assert ticket is not None
                    sending.link.up.append((sending.id, instruction, ticket))
                case SendAbort() | SendAbortAck():
                    sending.link.up.append((sending.id, instruction))
                case ReportCommitted():
                    sending.endings.append("committed")
                case ReportFailed():
                    sending.endings.append("failed")
                    self.blocks.free(sending.sequence)
                case FreeSources():
                    self._free(sending)
        assert len(sending.endings) <= 1, f"ended twice: {sending.endings}"

    def _free(self, sending: Sending) -> None:
        assert not sending.num_in_flight, "freed while a send is in flight"
        assert not sending.packed, "freed while a frame is packed"
        assert not sending.is_freed, "freed twice"
        sending.is_freed = True
        for hold in sending.holds:
            hold.release()
        self.leases.release(sending.id)
        self.ended[sending.id] = self.sendings.pop(sending.id)

    def _end(self, sending: Sending, reason: FailureReason) -> None:
        self.did(sending, sending.machine.expired(failure(reason)))

    def _of(self, link: Link) -> list[Sending]:
        return [sending for sending in self.sendings.values() if sending.link is link]


def _one(position: int) -> range:
    return range(position, position + 1)


def _seal_of(sending: Sending, plan: FramePlan) -> PlaceSeal:
    seed = digest_seed(sending.id, sending.incoming.request.cache_salt)
    return PlaceSeal(seed, plan.layer_start, plan.num_layers, plan.positions)
