"""Halves of a hand-off of one block, so that the next real one finds its code where it left it.

What a hand-off runs through takes a processor that has done other things since several times as
long: code, tables and the driver's launch have to come from far away again. Where a frame is about
to come, and nobody else needs this thread, each end plays what it will do: its machine, headers,
the kernel and what waits for it. Nothing is sent, and the block is nobody's.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch

from cluster.isolation import isolated
from cluster.request import SamplingParams, SequenceRequest
from kv_transfer.device_moves import DeviceMoves
from kv_transfer.digests import PlaceSeal, digest_seed
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
    from collections.abc import Callable, Sequence

    from kv_transfer.transfer import Ticket

logger = logging.getLogger(__name__)

# What is cold again after longer; a small part of it is spent here.
EVERY_SECONDS = 0.001
_TRANSFER_ID, _SLOT, _TABLE = bytes(16), SlotName(0, 0), (0,)
_SEQUENCE = IncomingSequence(
    transfer_id=_TRANSFER_ID,
    attempt=1,
    request=SequenceRequest(
        sequence_id="rehearsal",
        request_id="rehearsal",
        prompt_token_ids=(0,),
        sampling=SamplingParams(max_tokens=2, seed=0),
    ),
    gateway_id="",
)


class Rehearsal:
    """Of one process, for pools like `pools`, on its event loop."""

    def __init__(self, pools: Sequence[torch.Tensor]) -> None:
        own = [torch.zeros_like(pool[:1, :1]).contiguous() for pool in pools]
        unit_bytes = sum(pool.shape[2] for pool in own)
        self._moves = DeviceMoves(own, takes_digests=True, num_lists=2)
        self._slot = torch.zeros(unit_bytes + 8, dtype=torch.uint8, device=own[0].device)
        self._limits = FrameLimits(1, unit_bytes, unit_bytes)
        # A seed as wide as those of real transfers: of another width, a kernel would be compiled
        # for it, in the middle of serving.
        self._place = FramePlace(PlaceSeal(digest_seed(b"", b""), 0, 1, (0,)), _TABLE, _TABLE)
        _, self._ticket = _reserved()
        self._is_packed = False
        self._is_running = False
        self._ended_at = 0.0
        self.num_departed = 0
        self.num_arrived = 0

    def depart(self) -> None:
        """What a sender does. Nothing when the last half was a moment ago; one that breaks is the
        last."""
        self._play(self._depart)

    def arrive(self) -> None:
        """What a receiver does; the same."""
        self._play(self._arrive if self._is_packed else self._depart)

    def _play(self, half: Callable[[], None]) -> None:
        if self._is_running or time.monotonic() - self._ended_at < EVERY_SECONDS:
            return
        self._is_running = True
        isolated(half, "hand-offs are not rehearsed any more", logger)

    def _end(self) -> None:
        self._is_running = False
        self._ended_at = time.monotonic()

    # ---- sending ------------------------------------------------------------------------------

    def _depart(self) -> None:
        outgoing = OutgoingTransfer(num_layers=1, num_blocks=1)
        outgoing.ticketed(self._ticket)
        outgoing.layers_computed(1, _TABLE, 1, None)
        plan = outgoing.next_frame(1)
        if plan is None:
            raise AssertionError("there is nothing to send")
        place = FramePlace(self._place.seal, plan.block_ids, _TABLE)
        packing = self._moves.gather(self._slot, place, None)
        packing.add_done_callback(lambda done: self._departed(outgoing, done))

    def _departed(self, outgoing: OutgoingTransfer, packing: asyncio.Future[None]) -> None:
        if packing.exception() is None:
            outgoing.commit_asked(1)
            outgoing.posted()
            pack_header(self._header())
            pack_commit(self._commit())
            parse_slot_read(pack_slot_read(_SLOT))
            outgoing.settled()
            self._is_packed = True
            self.num_departed += 1
        self._end()

    # ---- receiving ----------------------------------------------------------------------------

    def _arrive(self) -> None:
        intake, _ = _reserved()
        header = parse_message(memoryview(pack_header(self._header())), self._limits)
        if not isinstance(header, FrameHeader):
            raise AssertionError("a header was read as something else")
        fate, _ = intake.frame_arrived(0, header, 0.0)
        if not (isinstance(fate, Landing) and intake.may_scatter(_TRANSFER_ID)):
            raise AssertionError("a frame of this ticket is not wanted")
        place = FramePlace(self._place.seal, fate.block_ids, _TABLE)
        placing = self._moves.scatter(self._slot, place)
        placing.add_done_callback(lambda done: self._arrived(intake, header, done))

    def _arrived(self, intake: Intake, header: FrameHeader, placing: asyncio.Future[bool]) -> None:
        if placing.exception() is None and placing.result():
            commit = parse_message(memoryview(pack_commit(self._commit())), self._limits)
            if not isinstance(commit, CommitMessage):
                raise AssertionError("a commit was read as something else")
            intake.commit_asked(
                0, _TRANSFER_ID, nonce=commit.nonce, epoch=commit.epoch,
                num_frames=commit.num_frames, first_token_id=commit.first_token_id, now=0.0,
            )  # fmt: skip
            intake.frame_ended(_TRANSFER_ID, None, header, 0.0)
            intake.started(_TRANSFER_ID, 0.0)
            self.num_arrived += 1
        self._end()

    # ---- messages -----------------------------------------------------------------------------

    def _header(self) -> FrameHeader:
        ticket, place = self._ticket, self._place
        return FrameHeader(
            transfer_id=_TRANSFER_ID,
            incarnation=ticket.incarnation,
            epoch=ticket.epoch,
            nonce=ticket.nonce,
            seq=0,
            layer_start=place.layer_start,
            num_layers=place.num_layers,
            positions=place.seal.positions,
            payload_bytes=self._limits.payload_bytes(place.num_units),
            slot=_SLOT,
        )

    def _commit(self) -> CommitMessage:
        return CommitMessage(
            transfer_id=_TRANSFER_ID,
            epoch=self._ticket.epoch,
            nonce=self._ticket.nonce,
            num_frames=1,
            first_token_id=1,
        )


def _reserved() -> tuple[Intake, Ticket]:
    """One that has given its first ticket, which is always the same."""
    intake = Intake(
        incarnation=1,
        num_layers=1,
        lease_seconds=1.0,
        drain_seconds=1.0,
        stall_seconds=1.0,
        draw_nonce=lambda: 1,
    )
    intake.session_opened(0)
    intake.reserve_asked(0, _SEQUENCE, 0.0)
    [sent] = intake.reserved(_TRANSFER_ID, _TABLE, 0, 0.0)
    if not isinstance(sent, SendTicket):
        raise AssertionError("a rehearsal got no ticket")
    return intake, sent.ticket
