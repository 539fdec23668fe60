"""The sending end of one transfer: a pure machine, events in, instructions out.

Life of an outgoing transfer
    1. PENDING      `Reserve` was sent. Chunks may be computed already; nothing is sent.
    2. ACTIVE       the ticket came. Computed layers of blocks that the receiver lacks become
                    frames: `next_frame` -> packed by the shell -> `posted` -> `settled`.
    3. COMMITTING   the first token is known and every frame is posted: `SendCommit`.
    4. DONE         the receiver committed.
    Any failure, from either end or from the link, ends the transfer at once for the node
    (`ReportFailed`) and for the peer (`SendAbort`); no frame is posted any more.
    5. QUARANTINED  until every posted send and every pack has ended. Then the peer's abort is
                    acknowledged with the exact number of frames to drain.
    6. FAILED

`FreeSources` comes exactly once, in DONE or FAILED, when nothing reads the source blocks any
more. Exactly one of `ReportCommitted`, `ReportFailed` and silence (the node withdrew it) tells
the node how it ended, before that.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kv_transfer.failures import FailureReason, failure
from kv_transfer.frame_place import at_positions
from kv_transfer.sending.outgoing_instructions import (
    FreeSources,
    ReportCommitted,
    ReportFailed,
    SendAbort,
    SendAbortAck,
    SendCommit,
)
from kv_transfer.transfer import TransferState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.errors import ServingError
    from kv_transfer.transfer import Ticket


Instruction = SendCommit | SendAbort | SendAbortAck | ReportCommitted | ReportFailed | FreeSources


@dataclass(frozen=True, slots=True)
class FramePlan:
    """Which layers of which blocks go into one frame. `after`: when they are computed."""

    layer_start: int
    num_layers: int
    positions: tuple[int, ...]
    block_ids: tuple[int, ...]
    table: tuple[int, ...]  # block ids of all positions from 0 on, as far as they are known
    after: Any

    @property
    def num_units(self) -> int:
        return self.num_layers * len(self.positions)


@dataclass(frozen=True, slots=True)
class _Part:
    """Layers `layer_start .. layer_end` of some blocks, to be sent once `after` has happened."""

    layer_start: int
    layer_end: int
    positions: tuple[int, ...]
    after: Any

    @property
    def num_units(self) -> int:
        return (self.layer_end - self.layer_start) * len(self.positions)


def _common(positions: range, lacked: tuple[int, ...]) -> Sequence[int]:
    """What both hold. Without a gap, as nearly always, without a look at each."""
    if not lacked:
        return ()
    first, end = lacked[0], lacked[-1] + 1
    if end - first == len(lacked):
        return range(max(positions.start, first), min(positions.stop, end))
    wanted = frozenset(lacked)
    return [position for position in positions if position in wanted]


class OutgoingTransfer:
    """See the module. `num_blocks` is that of the whole prompt, its last block maybe partial."""

    def __init__(self, *, num_layers: int, num_blocks: int) -> None:
        self.state = TransferState.PENDING
        self.ticket: Ticket | None = None
        self.num_posted = 0
        self._num_layers = num_layers
        self._num_blocks = num_blocks
        self._block_ids: list[int] = []  # of all blocks that some layer is computed of
        self._num_complete = 0  # blocks with every layer; those after them have `_num_layers_begun`
        self._num_layers_begun = 0
        self._missing: tuple[int, ...] | None = None  # ascending
        self._last_lacked: tuple[int, int, tuple[int, ...]] = (0, 0, ())
        self._last_table: tuple[int, ...] = ()
        self._last_ids: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self._ready: deque[_Part] = deque()  # before the ticket: of all blocks
        self._num_unplanned = 0  # units
        self._num_packing = 0
        self._num_in_flight = 0
        self._first_token_id: int | None = None
        self._ack_epoch: int | None = None
        self._is_freed = False

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def num_source_blocks(self) -> int:
        """Those that something was computed of: no send reads another."""
        return len(self._block_ids)

    @property
    def progress(self) -> tuple[TransferState, int, int, int]:
        """Another one whenever it has moved. What a peer repeats moves nothing."""
        return self.state, self.num_posted, self._num_packing, self._num_in_flight

    @property
    def may_post(self) -> bool:
        return self.state in (TransferState.ACTIVE, TransferState.COMMITTING)

    @property
    def is_draining(self) -> bool:
        """It has ended, but something of it still reads the source blocks."""
        return self.state is TransferState.QUARANTINED

    @property
    def waits_for_peer(self) -> bool:
        """It goes on only when the peer takes a frame or answers the commit."""
        is_committing = self.state is TransferState.COMMITTING
        return self.may_post and (is_committing or self._num_in_flight > 0)

    @property
    def waits_for_sends(self) -> bool:
        """The receiver has it all, but has not let go of what it was sent."""
        return self.state is TransferState.DONE and self._num_in_flight > 0

    @property
    def is_over(self) -> bool:
        """Nothing is left to do: the sources are free."""
        return self._is_freed

    @property
    def has_frame(self) -> bool:
        return self.may_post and bool(self._ready)

    # ---- what the node says -------------------------------------------------------------

    def chunk_computed(self, num_blocks: int, block_table: Sequence[int], after: Any) -> None:
        """The first `num_blocks` blocks of the prompt are complete once `after` happened."""
        self.layers_computed(num_blocks, block_table, self._num_layers, after)

    def layers_computed(
        self, num_blocks: int, block_table: Sequence[int], layer_end: int, after: Any
    ) -> None:
        """The layers below `layer_end` of the first `num_blocks` blocks are computed once `after`
        happened. Layers come in order; blocks follow when the last layer of those before them
        came. Nothing for what was said before."""
        num_blocks = min(num_blocks, self._num_blocks)
        begun = len(self._block_ids)
        if self._num_layers_begun == 0:
            self._block_ids += block_table[begun:num_blocks]
        elif num_blocks > begun:
            raise ValueError("the layers of earlier blocks are not complete")
        first, end = self._num_complete, min(num_blocks, len(self._block_ids))
        if first >= end or layer_end <= self._num_layers_begun:
            return
        positions = self._lacked(first, len(self._block_ids))
        if positions and (self._missing is None or self.may_post):
            self._ready.append(_Part(self._num_layers_begun, layer_end, positions, after))
        self._num_layers_begun = layer_end
        if layer_end == self._num_layers:
            self._num_complete, self._num_layers_begun = len(self._block_ids), 0

    def _lacked(self, first: int, end: int) -> tuple[int, ...]:
        """The positions of `first .. end` that the receiver lacks; all while that is not known.
        Layers of the same blocks follow each other, and get the same object."""
        if self._last_lacked[:2] != (first, end):
            positions: Sequence[int] = range(first, end)
            if self._missing is not None:
                positions = _common(range(first, end), self._missing)
            self._last_lacked = (first, end, tuple(positions))
        return self._last_lacked[2]

    def _ids_at(self, positions: tuple[int, ...]) -> tuple[int, ...]:
        """The same of their blocks."""
        if positions is not self._last_ids[0]:
            self._last_ids = (positions, at_positions(self._block_ids, positions))
        return self._last_ids[1]

    def _table(self) -> tuple[int, ...]:
        """The same object until more blocks are known."""
        if len(self._last_table) != len(self._block_ids):
            self._last_table = tuple(self._block_ids)
        return self._last_table

    def commit_asked(self, first_token_id: int) -> list[Instruction]:
        if self.state is not TransferState.PENDING and not self.may_post:
            return []
        self._first_token_id = first_token_id
        return self._commit_if_sent()

    def withdrawn(self) -> list[Instruction]:
        """The node needs the transfer no more. Idempotent; nothing once it has ended."""
        return self._end(None, tells_node=False, tells_peer=True)

    # ---- what the shell did ---------------------------------------------------------------

    def next_frame(self, max_units: int) -> FramePlan | None:
        """The next frame of at most `max_units` layers of blocks; the shell packs it now. A few
        layers of all blocks, if one fits: then all frames of a part name the same blocks, and what
        was found out of these serves again."""
        if not self.has_frame:
            return None
        part = self._ready.popleft()
        num_positions = len(part.positions)
        num_layers = max(1, max_units // num_positions)
        layer_end = min(part.layer_end, part.layer_start + num_layers)
        count = -(-num_positions // -(-num_positions // max_units))  # in frames of about one size
        positions, left = part.positions[:count], part.positions[count:]
        if left:
            self._ready.appendleft(replace(part, positions=left))
        if layer_end < part.layer_end:
            self._ready.appendleft(replace(part, layer_start=layer_end, positions=positions))
        plan = FramePlan(
            layer_start=part.layer_start,
            num_layers=layer_end - part.layer_start,
            positions=positions,
            block_ids=self._ids_at(positions),
            table=self._table(),
            after=part.after,
        )
        self._num_unplanned -= plan.num_units
        self._num_packing += 1
        return plan

    def posted(self) -> tuple[int, list[Instruction]]:
        """A planned frame goes out now; returns its `seq`. Only while `may_post`."""
        seq = self.num_posted
        self.num_posted += 1
        self._num_packing -= 1
        self._num_in_flight += 1
        return seq, self._commit_if_sent()

    def failed(self, error: ServingError) -> list[Instruction]:
        """A planned frame could not be packed. It is `dropped` when nothing of it reads blocks."""
        return self._end(error, tells_node=True, tells_peer=True)

    def dropped(self) -> list[Instruction]:
        """A planned frame will not go out: the transfer has ended meanwhile."""
        self._num_packing -= 1
        return self._settle()

    def settled(self, error: ServingError | None = None) -> list[Instruction]:
        """A posted send has ended; its slot is free."""
        self._num_in_flight -= 1
        if error is not None and not self.state.is_final:
            is_lost = error.reason == FailureReason.LINK_LOST  # else it never went out
            told = self._of_link(error) if is_lost else error
            return self._end(error, tells_node=True, tells_peer=True, told=told)
        return self._settle()

    # ---- what the peer says -----------------------------------------------------------------

    def ticketed(self, ticket: Ticket) -> list[Instruction]:
        if self.state is not TransferState.PENDING:
            return []
        positions = ticket.missing_positions
        ascending = all(a < b for a, b in itertools.pairwise(positions))
        if positions and not (ascending and positions[-1] < self._num_blocks):
            error = failure(FailureReason.TICKET_INVALID)
            return self._end(error, tells_node=True, tells_peer=True)
        self.state = TransferState.ACTIVE
        self.ticket = ticket
        self._missing = positions
        self._last_lacked = (0, 0, ())
        self._num_unplanned = len(positions) * self._num_layers
        computed, self._ready = self._ready, deque()
        for part in computed:
            first, end = part.positions[0], part.positions[-1] + 1  # all of them
            lacked = self._lacked(first, end)
            if lacked:
                self._ready.append(replace(part, positions=lacked))
        return self._commit_if_sent()

    def refused(self, error: ServingError) -> list[Instruction]:
        """The receiver has no place for it; it forgot the transfer already."""
        if self.state is not TransferState.PENDING:
            return []
        return self._end(error, tells_node=True, tells_peer=False)

    def committed(self, error: ServingError | None) -> list[Instruction]:
        if self.state is not TransferState.COMMITTING:
            return []
        if error is not None:
            return self._end(error, tells_node=True, tells_peer=False)
        self.state = TransferState.DONE
        return [ReportCommitted(), *self._settle()]

    def abort_asked(self, epoch: int, error: ServingError) -> list[Instruction]:
        """The receiver gave up. Acknowledged once nothing is in flight; again if repeated."""
        self._ack_epoch = epoch
        return self._end(error, tells_node=True, tells_peer=False)

    def peer_lost(self, error: ServingError) -> list[Instruction]:
        """The session ended. In-flight sends end too, by `settled`."""
        self._ack_epoch = None
        return self._end(error, tells_node=True, tells_peer=False, told=self._of_link(error))

    def expired(self, error: ServingError) -> list[Instruction]:
        """Its lease or deadline passed."""
        return self._end(error, tells_node=True, tells_peer=True)

    # ---- endings --------------------------------------------------------------------------

    def _of_link(self, error: ServingError) -> ServingError:
        """What the node is told of a link that broke: a commit may have arrived, with all frames
        before it, also those whose sends have not ended."""
        is_committing = self.state is TransferState.COMMITTING
        return failure(FailureReason.COMMIT_UNKNOWN) if is_committing else error

    def _end(
        self,
        error: ServingError | None,
        *,
        tells_node: bool,
        tells_peer: bool,
        told: ServingError | None = None,
    ) -> list[Instruction]:
        """`told`: to the node, if something else than to the peer."""
        instructions: list[Instruction] = []
        if not self.state.is_final and self.state is not TransferState.QUARANTINED:
            self.state = TransferState.QUARANTINED
            self._ready.clear()
            if tells_peer:
                instructions.append(SendAbort(self.num_posted, error))
            if tells_node and error is not None:
                instructions.append(ReportFailed(told or error))
        return instructions + self._settle()

    def _settle(self) -> list[Instruction]:
        """Move on from QUARANTINED, and free the sources, once nothing is in flight."""
        if self._num_packing or self._num_in_flight:
            return []
        instructions: list[Instruction] = []
        if self.state is TransferState.QUARANTINED:
            self.state = TransferState.FAILED
        if self.state.is_final and self._ack_epoch is not None:
            instructions.append(SendAbortAck(self._ack_epoch, self.num_posted))
            self._ack_epoch = None
        if self.state.is_final and not self._is_freed:
            self._is_freed = True
            instructions.append(FreeSources())
        return instructions

    def _commit_if_sent(self) -> list[Instruction]:
        """`SendCommit` when the first token is known and every missing block was posted."""
        first_token_id = self._first_token_id
        if self.state is not TransferState.ACTIVE or first_token_id is None:
            return []
        if self._ready or self._num_packing:
            return []
        if self._num_unplanned:
            error = failure(FailureReason.INCOMPLETE)
            return self._end(error, tells_node=True, tells_peer=True)
        self.state = TransferState.COMMITTING
        return [SendCommit(self.num_posted, first_token_id)]
