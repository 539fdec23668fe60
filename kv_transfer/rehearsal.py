"""A hand-off of one block to ourselves, so that the next one finds its code where it left it.

What a hand-off runs through takes a processor that has done other things since several times as
long: code, tables and the driver's launch have to come from far away again. Where a frame is about
to come, and nobody else needs this thread, one is played through all of it: both machines, headers,
the kernels and what waits for them. Nothing is sent, and its blocks are its own.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch

from cluster.request import SamplingParams, SequenceRequest
from kv_transfer.device_moves import DeviceMoves
from kv_transfer.digests import PlaceSeal
from kv_transfer.frame_place import FramePlace
from kv_transfer.protocol import (
    CommitMessage,
    FrameHeader,
    FrameLimits,
    SlotName,
    pack_commit,
    pack_header,
    pack_slot_read,
    parse_message,
    parse_slot_read,
)
from kv_transfer.receiving.incoming import IncomingSequence
from kv_transfer.receiving.intake import Intake
from kv_transfer.receiving.intake_instructions import Landing, SendTicket
from kv_transfer.sending.outgoing import OutgoingTransfer

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from kv_transfer.transfer import Ticket

logger = logging.getLogger(__name__)

# What is cold again after longer; a fraction of it is spent here.
EVERY_SECONDS = 0.001
_REQUEST = SequenceRequest(
    sequence_id="rehearsal",
    request_id="rehearsal",
    prompt_token_ids=(0,),
    sampling=SamplingParams(max_tokens=2, seed=0),
)
_TRANSFER_ID, _SLOT = bytes(16), SlotName(0, 0)


class Rehearsal:
    """Of one process, for pools like `pools`, on its event loop."""

    def __init__(self, pools: Sequence[torch.Tensor]) -> None:
        own = [torch.zeros_like(pool[:1, :1]).contiguous() for pool in pools]
        unit_bytes = sum(pool.shape[2] for pool in own)
        self._moves = DeviceMoves(own, takes_digests=True, num_lists=2)
        self._slot = torch.zeros(unit_bytes + 8, dtype=torch.uint8, device=own[0].device)
        self._limits = FrameLimits(1, unit_bytes, unit_bytes)
        self._ended_at = 0.0
        self._is_running = False
        self.num_played = 0  # to their end

    def play(self) -> None:
        """Begin one, unless the last was a moment ago. One that breaks is the last."""
        if self._is_running or time.monotonic() - self._ended_at < EVERY_SECONDS:
            return
        self._is_running = True
        try:
            self._begin()
        except Exception:  # who calls has real hand-offs to care for
            logger.exception("hand-offs are not rehearsed any more")

    def _begin(self) -> None:
        self._intake = _make_intake()
        self._outgoing = OutgoingTransfer(num_layers=1, num_blocks=1)
        self._ticket = _ticket_of(self._intake)
        self._outgoing.ticketed(self._ticket)
        self._outgoing.layers_computed(1, (0,), 1, None)
        plan = self._outgoing.next_frame(1)
        if plan is None:
            raise AssertionError("there is nothing to play")
        seal = PlaceSeal(0, plan.layer_start, plan.num_layers, plan.positions)
        self._place = FramePlace(seal, plan.block_ids, plan.block_ids)
        packed = self._moves.gather(self._slot, self._place, None)
        packed.add_done_callback(self._packed)

    def _packed(self, packing: asyncio.Future[None]) -> None:
        if packing.exception() is not None:
            self._end()
            return
        seq, _ = self._outgoing.posted()
        header = parse_message(memoryview(pack_header(self._header(seq))), self._limits)
        if not isinstance(header, FrameHeader):
            raise AssertionError("a header was read as something else")
        fate, _ = self._intake.frame_arrived(0, header, 0.0)
        if not (isinstance(fate, Landing) and self._intake.may_scatter(header.transfer_id)):
            raise AssertionError("a rehearsed frame is not wanted")
        self._arrived = header
        self._moves.scatter(self._slot, self._place).add_done_callback(self._placed)

    def _placed(self, placing: asyncio.Future[bool]) -> None:
        if placing.exception() is None and placing.result():
            self._intake.frame_ended(_TRANSFER_ID, None, self._arrived, 0.0)
            self._outgoing.commit_asked(1)
            self._commit()
            self._outgoing.settled()
            parse_slot_read(pack_slot_read(_SLOT))
            self.num_played += 1
        self._end()

    def _commit(self) -> None:
        ticket = self._ticket
        commit = parse_message(
            memoryview(
                pack_commit(
                    CommitMessage(
                        transfer_id=_TRANSFER_ID,
                        epoch=ticket.epoch,
                        nonce=ticket.nonce,
                        num_frames=1,
                        first_token_id=1,
                    )
                )
            ),
            self._limits,
        )
        if isinstance(commit, CommitMessage):
            self._intake.commit_asked(
                0, commit.transfer_id, nonce=commit.nonce, epoch=commit.epoch,
                num_frames=commit.num_frames, first_token_id=1, now=0.0,
            )  # fmt: skip
            self._intake.started(commit.transfer_id, 0.0)

    def _header(self, seq: int) -> FrameHeader:
        ticket, place = self._ticket, self._place
        return FrameHeader(
            transfer_id=_TRANSFER_ID,
            incarnation=ticket.incarnation,
            epoch=ticket.epoch,
            nonce=ticket.nonce,
            seq=seq,
            layer_start=place.layer_start,
            num_layers=place.num_layers,
            positions=place.seal.positions,
            payload_bytes=self._limits.payload_bytes(place.num_units),
            slot=_SLOT,
        )

    def _end(self) -> None:
        self._is_running = False
        self._ended_at = time.monotonic()


def _make_intake() -> Intake:
    intake = Intake(
        incarnation=1,
        num_layers=1,
        lease_seconds=1.0,
        drain_seconds=1.0,
        stall_seconds=1.0,
        draw_nonce=lambda: 1,
    )
    intake.session_opened(0)
    return intake


def _ticket_of(intake: Intake) -> Ticket:
    sequence = IncomingSequence(
        transfer_id=_TRANSFER_ID, attempt=1, request=_REQUEST, gateway_id=""
    )
    intake.reserve_asked(0, sequence, 0.0)
    [sent] = intake.reserved(_TRANSFER_ID, (0,), 0, 0.0)
    if not isinstance(sent, SendTicket):
        raise AssertionError("a rehearsal got no ticket")
    return sent.ticket
