"""What comes out of host memory for another node: whole or in part, and never at others' cost."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, cast

import pytest

from engine.block_copies import CopyKind
from engine.block_manager import BlockManager
from engine.held_prefix import hold_prefix
from engine.restores import Restores, Wish
from tests.interleavings import explore
from tests.sequences import BLOCK_SIZE, compute, make_request, make_sequence

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.block_copies import BlockCopy
    from engine.host_blocks import HostBlocks
    from engine.reservation import Hold
    from engine.sequence import Sequence

PROMPT = range(3 * BLOCK_SIZE + 1)
GOOD, BAD = 7, 8


class Bus:
    def __init__(self) -> None:
        self.seconds_per_block = 1.0

    def load_seconds(self, num_blocks: int) -> float:
        return num_blocks * self.seconds_per_block


class Giver:
    """A pool above host memory, where the prompt's three blocks are in host memory alone. Copies
    end when the test says so; what was saved has the digest `GOOD`."""

    def __init__(self, num_blocks: int = 8, *, num_left_in_pool: int = 0) -> None:
        self.manager = BlockManager(
            num_blocks, BLOCK_SIZE, num_host_blocks=16, num_ahead=num_blocks
        )
        self.bus = Bus()
        self.restores = Restores(self.manager, self.bus)
        self.hashes = self.run(PROMPT).block_hashes[:3]
        self.fill(num_blocks - num_left_in_pool)

    @property
    def host(self) -> HostBlocks:
        assert self.manager.host is not None
        return self.manager.host

    def run(self, prompt: range) -> Sequence:
        """Compute a prompt and let go of it; what it leaves is saved."""
        sequence = make_sequence(prompt)
        assert compute(self.manager, sequence)
        self.manager.free(sequence)
        while copies := self.host.take_copies():
            for copy in copies:
                self.end(copy)
        return sequence

    def fill(self, num_blocks: int) -> None:
        """Evict, so that all blocks are free but those that are left."""
        sequence = make_sequence(range(9000, 9000 + num_blocks * BLOCK_SIZE))
        assert self.manager.allocate(sequence, sequence.num_tokens)
        self.manager.free(sequence)

    def occupy(self, num_blocks: int) -> Sequence:
        """A sequence that runs, with so many blocks."""
        sequence = make_sequence(range(7000, 7000 + num_blocks * BLOCK_SIZE))
        assert self.manager.allocate(sequence, sequence.num_tokens)
        return sequence

    def ask(self, seconds_per_block: float = 1.0, num_blocks: int = 3) -> Future[Hold]:
        answer: Future[Hold] = Future()
        self.restores.begin(Wish(self.hashes[:num_blocks], "p0", seconds_per_block, answer))
        self.manager.check_integrity()
        return answer

    def load(self) -> BlockCopy:
        (copy,) = (copy for copy in self.host.take_copies() if copy.kind is CopyKind.LOAD)
        return copy

    def end(self, copy: BlockCopy, digests: list[int] | None = None) -> None:
        self.host.end(copy, digests or [GOOD] * len(copy.entries))
        self.manager.check_integrity()


def test_what_host_memory_alone_has_is_brought_into_the_pool_and_held() -> None:
    giver = Giver()
    answer = giver.ask()
    assert not answer.done()
    giver.end(giver.load())
    hold = answer.result(0)
    assert list(hold.block_ids) == giver.manager.match_prefix(giver.hashes)
    assert len(hold.block_ids) == 3
    assert giver.manager.num_referenced_blocks == 3
    hold.release()
    assert giver.manager.num_referenced_blocks == 0
    assert giver.restores.stats.num_restored == 3


def test_what_the_pool_has_is_held_while_the_rest_is_brought() -> None:
    giver = Giver(num_left_in_pool=2)
    assert len(giver.manager.match_prefix(giver.hashes)) == 2
    answer = giver.ask()
    copy = giver.load()
    assert len(copy.entries) == 1
    assert giver.manager.num_referenced_blocks == 3
    giver.end(copy)
    assert len(answer.result(0).block_ids) == 3


def test_a_full_pool_gives_what_it_has_and_takes_nothing_from_who_runs() -> None:
    giver = Giver(num_left_in_pool=1)
    running = giver.occupy(7)
    before = list(running.block_table)
    answer = giver.ask()
    assert len(answer.result(0).block_ids) == 1, "at once"
    assert running.block_table == before
    assert giver.restores.stats.num_without_room == 2


def test_a_share_of_the_pool_is_left_to_who_runs() -> None:
    giver = Giver(num_blocks=16)
    giver.occupy(12)
    answer = giver.ask()
    giver.end(giver.load())
    assert len(answer.result(0).block_ids) == 2
    assert giver.manager.num_free_blocks == 16 // 8
    assert giver.restores.stats.num_without_room == 1


def test_what_is_found_is_held_beside_that_share() -> None:
    giver = Giver(num_left_in_pool=2)
    giver.occupy(5)
    answer = giver.ask()
    assert len(answer.result(0).block_ids) == 2
    assert giver.manager.num_free_blocks == 8 // 8


def test_blocks_that_are_nowhere_else_are_not_given_up_for_it() -> None:
    giver = Giver()
    cached = make_sequence(range(500, 500 + 6 * BLOCK_SIZE))
    compute(giver.manager, cached)
    giver.manager.free(cached)
    assert giver.host.num_dirty == 6
    hold = giver.ask()
    giver.end(giver.load())
    assert len(hold.result(0).block_ids) == 1
    assert len(giver.manager.match_prefix(cached.block_hashes)) == 6


def test_a_slow_bus_brings_nothing_that_would_be_computed_sooner() -> None:
    giver = Giver(num_left_in_pool=1)
    giver.bus.seconds_per_block = 1.1
    assert len(giver.ask().result(0).block_ids) == 1
    assert giver.restores.stats.num_too_slow == 2
    assert len(giver.ask(seconds_per_block=0.0).result(0).block_ids) == 1
    giver.bus.seconds_per_block = 0.0  # not known: one is tried
    answer = giver.ask()
    giver.end(giver.load())
    assert len(answer.result(0).block_ids) == 3


def test_what_waits_for_the_bus_already_counts() -> None:
    giver = Giver(num_blocks=32)
    other = giver.run(range(100, 100 + 2 * BLOCK_SIZE + 1))
    giver.fill(32)
    again = make_sequence(other.prompt_token_ids)
    assert giver.manager.allocate(again, again.num_tokens)
    assert again.is_loading
    assert giver.ask(seconds_per_block=1.5).result(0).block_ids == ()
    assert not giver.ask(seconds_per_block=2.0).done()


def test_from_the_first_block_that_has_changed_on_nothing_is_given() -> None:
    giver = Giver()
    answer = giver.ask()
    giver.end(giver.load(), [GOOD, BAD, GOOD])
    hold = answer.result(0)
    assert list(hold.block_ids) == giver.manager.match_prefix(giver.hashes)
    assert len(hold.block_ids) == 1
    assert giver.restores.stats.num_bad == 2
    hold.release()
    assert giver.manager.num_referenced_blocks == 0


def test_what_was_forgotten_meanwhile_is_not_given_nor_cached() -> None:
    giver = Giver(num_left_in_pool=1)
    answer = giver.ask()
    copy = giver.load()
    giver.manager.reset_prefix_cache()
    giver.end(copy)
    assert answer.result(0).block_ids == ()
    assert giver.manager.cached_hashes() == []
    assert giver.manager.num_free_blocks == 8


def test_a_load_of_somebody_else_is_waited_for_and_not_repeated() -> None:
    giver = Giver()
    sequence = make_sequence(PROMPT)
    assert giver.manager.allocate(sequence, sequence.num_tokens)
    giver.bus.seconds_per_block = 0.5
    first, second = giver.ask(), giver.ask(num_blocks=2)
    giver.end(giver.load())
    assert giver.host.take_copies() == []
    assert list(first.result(0).block_ids) == sequence.block_table[:3]
    assert list(second.result(0).block_ids) == sequence.block_table[:2]


def test_two_nodes_that_ask_for_the_same_share_one_load() -> None:
    giver = Giver()
    first, second = giver.ask(), giver.ask()
    giver.end(giver.load())
    assert giver.host.take_copies() == []
    assert first.result(0).block_ids == second.result(0).block_ids
    assert giver.restores.stats.num_restored == 3


def test_who_has_gone_away_holds_nothing_and_what_came_stays_cached() -> None:
    giver = Giver()
    answer = giver.ask()
    assert answer.cancel()
    giver.end(giver.load())
    assert giver.manager.num_referenced_blocks == 0
    assert len(giver.manager.match_prefix(giver.hashes)) == 3


def test_a_sequence_that_comes_meanwhile_waits_for_the_restore_and_finds_its_blocks() -> None:
    giver = Giver()
    answer = giver.ask()
    sequence = make_sequence(PROMPT)
    assert not giver.manager.allocate(sequence, sequence.num_tokens)
    giver.end(giver.load())
    assert giver.manager.allocate(sequence, sequence.num_tokens)
    assert tuple(sequence.block_table[:3]) == answer.result(0).block_ids


def test_without_host_memory_the_pool_is_all_there_is() -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    sequence = make_sequence(PROMPT)
    compute(manager, sequence)
    answer: Future[Hold] = Future()
    Restores(manager).begin(Wish(sequence.block_hashes, "p0", 1.0, answer))
    assert list(answer.result(0).block_ids) == sequence.block_table[:3]


# ---- every order -----------------------------------------------------------------------------

STEPS = (
    "first asks",
    "second asks",
    "first leaves",
    "first lets go",
    "second lets go",
    "sequence comes",
    "sequence ends",
    "copy ends well",
    "copy ends badly",
    "copy fails",
    "cache is reset",
)


class World:
    """Two nodes ask for a prefix that one copy brings, and a prompt that begins with it comes."""

    def __init__(self) -> None:
        self.giver = Giver(num_blocks=10)
        self.answers: dict[str, Future[Hold]] = {}
        self.copies: list[BlockCopy] = []
        self.sequence: Sequence | None = None
        self.has_ended = False

    def possible(self) -> dict[str, Callable[[], None]]:
        steps: dict[str, Callable[[], None]] = {"cache is reset": self.reset}
        for name in ("first", "second"):
            steps[f"{name} asks"] = lambda name=name: self.ask(name)  # type: ignore[misc]
            if (answer := self.answers.get(name)) is None:
                continue
            if answer.done() and not answer.cancelled():
                steps[f"{name} lets go"] = answer.result(0).release
            elif not answer.done():
                steps[f"{name} leaves"] = lambda answer=answer: answer.cancel()  # type: ignore[misc]
        if self.sequence is None:
            steps["sequence comes"] = self.come
        elif not self.has_ended:
            steps["sequence ends"] = self.leave
        if self.copies:
            steps["copy ends well"] = lambda: self.end([GOOD] * 3)
            steps["copy ends badly"] = lambda: self.end([GOOD, BAD, GOOD])
            steps["copy fails"] = lambda: self.end(None)
        return steps

    def ask(self, name: str) -> None:
        self.answers[name] = self.giver.ask()
        self.take()

    def come(self) -> None:
        self.sequence = make_sequence(PROMPT)
        self.giver.manager.allocate(self.sequence, self.sequence.num_tokens)
        self.take()

    def leave(self) -> None:
        assert self.sequence is not None
        self.has_ended = True
        self.giver.manager.free(self.sequence)
        self.take()

    def reset(self) -> None:
        self.giver.manager.reset_prefix_cache()

    def end(self, digests: list[int] | None) -> None:
        copy = self.copies.pop(0)
        self.giver.host.end(copy, None if digests is None else digests[: len(copy.entries)])
        self.take()

    def take(self) -> None:
        taken = self.giver.host.take_copies()
        for copy in taken:
            assert copy.kind is CopyKind.LOAD
        self.copies += taken
        assert len(self.copies) <= 1, "the same blocks are read once at a time"
        self.giver.manager.check_integrity()
        self.check_held()

    def check_held(self) -> None:
        """What is held is of the prefix, and nobody writes to it."""
        for answer in self.answers.values():
            if answer.done() and not answer.cancelled() and not answer.result(0).is_released:
                held = answer.result(0).block_ids
                for copy in self.copies:
                    assert set(copy.block_ids).isdisjoint(held)

    def finish(self) -> None:
        while self.copies:
            self.end([GOOD] * 3)
        assert all(answer.done() for answer in self.answers.values()), "nobody waits for ever"
        for answer in self.answers.values():
            if not answer.cancelled():
                answer.result(0).release()
        if self.sequence is not None:
            self.giver.manager.free(self.sequence)
        manager = self.giver.manager
        manager.check_integrity()
        assert manager.num_free_blocks == manager.num_blocks, manager.owners()
        assert self.giver.host.tier.num_moving == 0


@pytest.mark.parametrize(
    "left_out",
    [
        {"copy fails", "cache is reset"},
        {"copy fails", "copy ends badly"},
        {"first lets go", "second lets go"},
    ],
    ids=["nothing is reset", "copies end well", "holds stay"],
)
def test_in_every_order_all_is_given_back_and_nobody_waits_for_ever(left_out: set[str]) -> None:
    assert explore(World, [step for step in STEPS if step not in left_out]) > 500


# ---- from the event loop ----------------------------------------------------------------------


class HandedOver:
    """Runs what it is given when the test says so."""

    def __init__(self) -> None:
        self.commands: list[tuple[Callable[[], Any], Future[Any]]] = []

    def call(self, run: Callable[[], Any]) -> Future[Any]:
        self.commands.append((run, Future()))
        return self.commands[-1][1]

    def run(self) -> None:
        while self.commands:
            run, future = self.commands.pop(0)
            future.set_result(run())


@pytest.mark.parametrize("moment", ["asked", "bringing", "on its way"])
def test_a_caller_that_is_cancelled_leaves_no_hold(moment: str) -> None:
    giver, loop = Giver(), HandedOver()
    request = make_request(PROMPT)
    giver.hashes = make_sequence(PROMPT).block_hashes[:3]

    async def scenario() -> None:
        asking = asyncio.create_task(
            hold_prefix(cast("Any", loop), giver.restores, request, "model", 1.0)
        )
        await asyncio.sleep(0)
        if moment != "asked":
            loop.run()
        if moment == "on its way":
            giver.end(giver.load())  # the hold is made, and not heard of yet
        asking.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled()
        loop.run()
        if moment == "bringing":
            giver.end(giver.load())
        loop.run()

    asyncio.run(scenario())
    assert giver.manager.num_referenced_blocks == 0
    giver.manager.check_integrity()


def test_an_engine_that_has_ended_is_not_waited_for() -> None:
    giver = Giver()

    class Ended:
        def call(self, run: Callable[[], Any]) -> Future[Any]:
            future: Future[Any] = Future()
            future.cancel()
            return future

    async def scenario() -> None:
        request = make_request(PROMPT)
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(10):
                await hold_prefix(cast("Any", Ended()), giver.restores, request, "model", 1.0)

    asyncio.run(scenario())
