"""Any order of operations and copies over two tiers: a hit is always the right block.

As in `test_block_manager_machine.py`, the model keeps what each block really contains, and each
slot of host memory too. Copies start and end when they like, fail, or bring other bytes than were
written; what they read or write belongs to them until they end. Other nodes ask for prefixes, get
what is there, and let go of it, or go away before.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from engine.block_copies import CopyKind
from engine.block_manager import BlockManager
from engine.restores import Restores, Wish
from tests.engine.test_block_manager_machine import Blocks, prompts, tokens
from tests.sequences import BLOCK_SIZE, make_sequence

if TYPE_CHECKING:
    from engine.block_copies import BlockCopy
    from engine.host_blocks import HostBlocks
    from engine.reservation import Hold
    from engine.sequence import Sequence

GARBAGE = (-1,) * 5 * BLOCK_SIZE


class IdleBus:
    def load_seconds(self, num_blocks: int) -> float:
        return 0.0


class TieredBlocks(Blocks):
    @initialize(num_blocks=st.integers(2, 8), num_host_blocks=st.integers(1, 16))
    def start(self, num_blocks: int, num_host_blocks: int) -> None:
        super().start(num_blocks, caching=True)
        self.manager = BlockManager(num_blocks, BLOCK_SIZE, num_host_blocks=num_host_blocks)
        self.restores = Restores(self.manager, IdleBus())
        self.wishes: list[tuple[Sequence, Future[Hold]]] = []
        self.slots: dict[int, tuple[int, ...]] = {}
        self.copies: dict[BlockCopy, list[tuple[int, ...]]] = {}  # with what they found

    @property
    def host(self) -> HostBlocks:
        assert self.manager.host is not None
        return self.manager.host

    # ---- a whole life at once: chance alone hardly ever fills two tiers -------------------

    @rule(prompt=prompts, ends=st.sampled_from(["freed", "preempted", "kept"]))
    def serve(self, prompt: list[int], ends: str) -> None:
        sequence = make_sequence(prompt, output=[1])
        self.alive.append(sequence)
        if not self.manager.allocate(sequence, sequence.num_tokens):
            return
        self.settle()
        self.compute(sequence, sequence.num_uncomputed_tokens - 1)
        if ends == "preempted":
            self.preempt(sequence)
        elif ends == "freed":
            self.free(sequence)
            self.settle()

    @rule()
    def settle(self) -> None:
        self.take_copies()
        for copy in list(self.copies):
            self.finish(copy)

    @rule(index=st.integers(0, 100))
    def resume(self, index: int) -> None:
        """One that has lost its blocks, or never had any, gets some."""
        idle = [sequence for sequence in self.alive if not sequence.block_table]
        if idle:
            self.allocate(idle[index % len(idle)], 1, 0)

    # ---- other nodes --------------------------------------------------------------------

    @precondition(lambda self: self.alive)
    @rule(index=st.integers(0, 400))
    def ask(self, index: int) -> None:
        """For what one of the sequences here begins with."""
        sequence = make_sequence(self.alive[index % len(self.alive)].prompt_token_ids)
        self.reserved.append(sequence)
        answer: Future[Hold] = Future()
        self.wishes.append((sequence, answer))
        self.restores.begin(Wish(sequence.block_hashes, "peer", 1.0, answer))

    @precondition(lambda self: self.copies)
    @rule()
    def spoil_a_load(self) -> None:
        for copy in [copy for copy in self.copies if copy.kind is CopyKind.LOAD]:
            self.finish(copy, "spoiled", len(copy.entries) - 1)

    @rule(prompt=st.lists(tokens, min_size=2 * BLOCK_SIZE + 1, max_size=5 * BLOCK_SIZE))
    def ask_host_memory(self, prompt: list[int]) -> None:
        """For a prompt that was served, saved and evicted: chance alone hardly ever does that."""
        self.serve(prompt, "preempted")  # all of it is saved
        self.settle()
        filler = make_sequence([2] * self.manager.num_free_blocks * BLOCK_SIZE)
        if filler.num_tokens and self.manager.allocate(filler, filler.num_tokens):
            self.manager.free(filler)
        self.ask(len(self.alive) - 1)
        self.take_copies()

    @precondition(lambda self: self.wishes)
    @rule(index=st.integers(0, 100))
    def let_go(self, index: int) -> None:
        """Of what it got, or before it got anything."""
        _, answer = self.wishes.pop(index % len(self.wishes))
        if not answer.cancel():
            answer.result(0).release()

    @invariant()
    def what_others_hold_is_what_they_asked_for(self) -> None:
        for sequence, answer in self.wishes:
            if answer.done():
                block_ids = answer.result(0).block_ids
                self.check_contents(block_ids, sequence, len(block_ids) * BLOCK_SIZE)

    # ---- copies -------------------------------------------------------------------------

    @rule()
    def take_copies(self) -> None:
        for copy in self.host.take_copies():
            sources = (
                [self.contents[block_id] for block_id in copy.block_ids]
                if copy.kind is CopyKind.SAVE
                else [self.slots[slot] for slot in copy.slots]
            )
            self.copies[copy] = sources

    @precondition(lambda self: self.copies)
    @rule(data=st.data(), outcome=st.sampled_from(["good", "good", "good", "failed", "spoiled"]))
    def end_copy(self, data: st.DataObject, outcome: str) -> None:
        copy = data.draw(st.sampled_from(list(self.copies)))
        spoiled = data.draw(st.integers(0, len(copy.entries) - 1)) if outcome == "spoiled" else -1
        self.finish(copy, outcome, spoiled)

    def finish(self, copy: BlockCopy, outcome: str = "good", spoiled: int = -1) -> None:
        """The bytes are moved now, the last moment there is."""
        found = self.copies.pop(copy)
        digests = []
        for index, (block_id, slot) in enumerate(zip(copy.block_ids, copy.slots, strict=True)):
            if copy.kind is CopyKind.SAVE:
                moved = self.contents[block_id]
                assert moved[: len(found[index])] == found[index], "written under a save"
                digests.append(hash(moved))
                self.slots[slot] = GARBAGE if index == spoiled else moved
            else:
                moved = GARBAGE if index == spoiled else self.slots[slot]
                if index != spoiled:
                    assert moved == found[index], "written under a load"
                digests.append(hash(moved))
                self.contents[block_id] = moved
        sequence = copy.sequence
        self.host.end(copy, None if outcome == "failed" else digests)
        if sequence is not None:
            assert not sequence.is_loading
            assert sequence.num_uncomputed_tokens >= 1
            self.check_contents(sequence.block_table, sequence, sequence.num_computed_tokens)
            if outcome == "failed":
                assert sequence.num_computed_tokens == copy.first_token

    # ---- always -------------------------------------------------------------------------

    @invariant()
    def what_is_in_a_copy_is_not_to_be_had(self) -> None:
        for copy in self.copies:
            assert all(self.manager.num_references(block_id) for block_id in copy.block_ids)

    def write(self, block_id: int, contents: tuple[int, ...], writer: object) -> None:
        for copy in self.copies:
            if copy.kind is CopyKind.LOAD:
                assert block_id not in copy.block_ids, "written under a load"
        super().write(block_id, contents, writer)

    def waits_for_a_load(self, sequence: Sequence) -> bool:
        """Of what it begins with, somebody else is bringing a part."""
        hashes = set(sequence.block_hashes)
        return any(
            entry.block_hash in hashes or entry.is_private
            for copy in self.host._copies
            for entry in copy.entries
            if copy.kind is CopyKind.LOAD
        )

    def hits_of(self, sequence: Sequence) -> list[int]:
        """Slots count as well: their blocks take room in the pool like any other."""
        return super().hits_of(sequence) if not sequence.block_table else []

    def teardown(self) -> None:
        if not hasattr(self, "slots"):
            return
        self.settle()
        while self.copies or self.host.num_copies:
            self.settle()
        while self.wishes:
            assert self.wishes[0][1].done(), "nobody waits for ever"
            self.let_go(0)
        super().teardown()
        tier = self.host.tier
        assert tier.num_moving == 0
        assert tier.num_available == tier.num_slots


TestTieredBlocks = TieredBlocks.TestCase
TestTieredBlocks.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
