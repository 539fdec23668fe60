"""Any order of operations keeps the books balanced, and a hit is always the right block.

The model keeps what each block really contains: whoever writes a block records the tokens it
stands for. A prefix hit that returns a block with other contents is the bug that ends in a
wrong answer with status 200.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from engine.block_manager import BlockManager
from engine.prefix_cache import BlockAccountingError
from engine.reservation import ReservationState
from tests.sequences import BLOCK_SIZE, make_sequence

if TYPE_CHECKING:
    from cluster.prefix_hash import BlockHash
    from engine.reservation import Hold, Reservation
    from engine.sequence import Sequence

tokens = st.integers(0, 1)  # few, so that prompts begin alike
prompts = st.lists(tokens, min_size=1, max_size=5 * BLOCK_SIZE)


class Blocks(RuleBasedStateMachine):
    sequences = Bundle("sequences")
    holds = Bundle("holds")
    reservations = Bundle("reservations")

    @initialize(num_blocks=st.integers(2, 12), caching=st.booleans())
    def start(self, num_blocks: int, caching: bool) -> None:
        self.manager = BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=caching)
        self.contents: dict[int, tuple[int, ...]] = {}
        self.index: dict[BlockHash, None] = {}  # as another process sees it
        self.alive: list[Sequence] = []
        self.open: list[Reservation] = []
        self.kept: list[Hold] = []
        self.reserved: list[Sequence] = []

    # ---- sequences ----------------------------------------------------------------------

    @rule(target=sequences, prompt=prompts, output=st.lists(tokens, max_size=3))
    def create(self, prompt: list[int], output: list[int]) -> Sequence:
        sequence = make_sequence(prompt, output=output)
        self.alive.append(sequence)
        return sequence

    def waits_for_a_load(self, sequence: Sequence) -> bool:
        return False

    @rule(sequence=sequences, extra=st.integers(0, 8), headroom=st.integers(0, 3))
    def allocate(self, sequence: Sequence, extra: int, headroom: int) -> None:
        before = list(sequence.block_table), self.manager.num_free_blocks
        num_tokens = sequence.num_computed_tokens + extra
        if self.manager.allocate(sequence, num_tokens, headroom=headroom):
            assert len(sequence.block_table) * BLOCK_SIZE >= num_tokens
            assert len(sequence.block_table) == len(before[0]) or (
                self.manager.num_free_blocks >= headroom
            )
            self.check_contents(sequence.block_table, sequence, sequence.num_computed_tokens)
            assert sequence.num_uncomputed_tokens >= 1 or before[0]
        else:
            assert (sequence.block_table, self.manager.num_free_blocks) == before
            if self.waits_for_a_load(sequence):
                return
            needed = self.manager.num_blocks_for(num_tokens) - len(before[0])
            assert needed + headroom > before[1] - len(self.hits_of(sequence))

    @rule(sequence=sequences, num_tokens=st.integers(1, 8))
    def compute(self, sequence: Sequence, num_tokens: int) -> None:
        """Write what fits into the table, as a step does, then say so."""
        if sequence.is_loading:
            return
        capacity = len(sequence.block_table) * BLOCK_SIZE
        end = min(sequence.num_computed_tokens + num_tokens, capacity, sequence.num_tokens)
        first = sequence.num_computed_tokens // BLOCK_SIZE
        for index in range(first, self.manager.num_blocks_for(end)):
            upto = min(end, (index + 1) * BLOCK_SIZE)
            self.write(sequence.block_table[index], tuple(sequence.token_ids[:upto]), sequence)
        sequence.num_computed_tokens = max(sequence.num_computed_tokens, end)
        self.manager.mark_computed(sequence)
        if sequence.block_table and sequence.num_uncomputed_tokens == 0:
            sequence.append_token(sequence.num_tokens % 2)

    @rule(sequence=sequences)
    def free(self, sequence: Sequence) -> None:
        self.manager.free(sequence)

    @rule(sequence=sequences)
    def preempt(self, sequence: Sequence) -> None:
        sequence.num_preemptions += 1
        self.manager.preempt(sequence)

    @rule(sequence=sequences)
    def forget(self, sequence: Sequence) -> None:
        self.manager.forget(sequence)
        assert self.manager.match_prefix(sequence.block_hashes[:1]) == [] or (
            not sequence.block_table
        )

    # ---- transfers ----------------------------------------------------------------------

    @rule(target=holds, sequence=sequences, first=st.integers(0, 3))
    def hold(self, sequence: Sequence, first: int) -> Hold:
        hold = self.manager.hold(sequence.block_table[first:], f"hold of {sequence.sequence_id}")
        self.kept.append(hold)
        return hold

    @rule(hold=holds)
    def release(self, hold: Hold) -> None:
        hold.release()

    @rule(target=reservations, prompt=prompts)
    def reserve(self, prompt: list[int]) -> object:
        sequence = make_sequence(prompt, output=[1])
        self.reserved.append(sequence)
        hashes = sequence.block_hashes[: len(prompt) // BLOCK_SIZE]
        free = self.manager.num_free_blocks
        reservation = self.manager.reserve(hashes, len(prompt), owner="test")
        if reservation is None:
            assert self.manager.num_free_blocks == free
            return multiple()
        held = reservation.block_ids[: reservation.num_held_blocks]
        self.check_contents(held, sequence, len(held) * BLOCK_SIZE)
        self.open.append(reservation)
        return sequence, reservation

    @rule(pair=reservations)
    def receive(self, pair: tuple[Sequence, Reservation]) -> None:
        """Part of the transfer: every missing block is written, maybe more than once."""
        sequence, reservation = pair
        if reservation.state is not ReservationState.OPEN:
            return
        for index in range(reservation.num_held_blocks, len(reservation.block_ids)):
            upto = min(reservation.num_tokens, (index + 1) * BLOCK_SIZE)
            self.write(reservation.block_ids[index], tuple(sequence.token_ids[:upto]), reservation)

    @rule(pair=reservations)
    def cancel(self, pair: tuple[Sequence, Reservation]) -> None:
        pair[1].cancel()

    @rule(target=sequences, pair=consumes(reservations))
    def attach(self, pair: tuple[Sequence, Reservation]) -> object:
        sequence, reservation = pair
        if reservation.state is not ReservationState.OPEN:
            with pytest.raises(BlockAccountingError):
                reservation.attach(sequence)
            return multiple()
        self.receive(pair)
        reservation.attach(sequence)
        self.alive.append(sequence)
        return sequence

    @rule(pair=consumes(reservations))
    def keep(self, pair: tuple[Sequence, Reservation]) -> None:
        """A prefix of whole blocks that came from elsewhere: for whoever asks next."""
        sequence, reservation = pair
        if reservation.state is not ReservationState.OPEN or reservation.num_tokens % BLOCK_SIZE:
            reservation.cancel()
            return
        self.receive(pair)
        reservation.keep(sequence.block_hashes[: len(reservation.block_ids)])
        with pytest.raises(BlockAccountingError):
            reservation.keep(sequence.block_hashes)

    # ---- the cache ----------------------------------------------------------------------

    @rule()
    def reset(self) -> None:
        self.manager.reset_prefix_cache()
        assert self.manager.num_cached_blocks == 0

    @rule()
    def publish(self) -> None:
        """Apply the events one by one: at no moment may a hash lack its parent."""
        events = self.manager.take_events()
        parents = {
            block_hash: parent
            for sequence in (*self.alive, *self.reserved)
            for parent, block_hash in pairwise((None, *sequence.block_hashes))
        }
        for block_hash in events.removed:
            del self.index[block_hash]  # KeyError: removed what was never stored
        for block_hash in events.stored:
            assert block_hash not in self.index
            assert parents[block_hash] is None or parents[block_hash] in self.index
            self.index[block_hash] = None
        assert all(parents[each] is None or parents[each] in self.index for each in self.index)
        assert set(self.index) == set(self.manager.cached_hashes())

    # ---- always -------------------------------------------------------------------------

    @invariant()
    def books_balance(self) -> None:
        self.manager.check_integrity()
        total = self.manager.num_free_blocks + self.manager.num_referenced_blocks
        assert total == self.manager.num_blocks

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        for hold in self.kept:
            hold.release()
        for reservation in self.open:
            reservation.cancel()
        for sequence in self.alive:
            self.manager.free(sequence)
        self.manager.check_integrity()
        assert self.manager.num_free_blocks == self.manager.num_blocks, self.manager.owners()

    # ---- the model ----------------------------------------------------------------------

    def write(self, block_id: int, contents: tuple[int, ...], writer: object) -> None:
        """Only a sole owner, or one that rewrites the same, may write."""
        for sequence in self.alive:
            if sequence is not writer and block_id in sequence.block_table:
                index = sequence.block_table.index(block_id)
                end = min(sequence.num_computed_tokens, (index + 1) * BLOCK_SIZE)
                assert tuple(sequence.token_ids[:end]) == contents[:end]
        self.contents[block_id] = contents

    def check_contents(
        self, block_ids: list[int] | tuple[int, ...], sequence: Sequence, num_tokens: int
    ) -> None:
        for index, block_id in enumerate(block_ids):
            end = min(num_tokens, (index + 1) * BLOCK_SIZE)
            if index * BLOCK_SIZE < end:
                assert self.contents[block_id][:end] == tuple(sequence.token_ids[:end])

    def hits_of(self, sequence: Sequence) -> list[int]:
        return [] if sequence.block_table else self.manager.match_prefix(sequence.block_hashes)


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
