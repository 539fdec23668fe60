"""Blocks are given to a fetched prefix only for what was asked for."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest

from cluster.clock import monotonic
from cluster.codec import decode_sequence
from cluster.errors import (
    Cancelled,
    NodeUnavailable,
    Overloaded,
    ServingError,
    TransferFailed,
)
from cluster.node import Incarnation, NodeId, NodeName
from cluster.request import PrefixHolder
from engine.block_manager import BlockManager
from engine.loop_parts import LoopStats
from prefill_node.fetch_estimate import (
    AVOID_SECONDS,
    FIXED_SECONDS,
    LATENCY_SECONDS,
    FetchEstimate,
    Lacking,
)
from prefill_node.holder_channels import MAX_CHANNELS, HolderChannels
from prefill_node.incoming_prefixes import IncomingPrefix
from prefill_node.prefix_fetches import FetchStats, PrefixFetches
from tests.kv_twins import ManualClock, until
from tests.sequences import BLOCK_SIZE, compute, make_sequence

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.request import SequenceRequest

US, HOLDER = (NodeId(NodeName(name), Incarnation(1)) for name in ("p0", "d0"))
PROMPT = range(5 * BLOCK_SIZE + 1)


class InlineLoop:
    """Runs what it is given at once, or, while the engine is at a step, at its end."""

    def __init__(self) -> None:
        self.stats = LoopStats()
        self.is_stepping = False
        self.given: list[tuple[Callable[[], Any], Future[Any]]] = []

    def call(self, run: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        self.given.append((run, future))
        if not self.is_stepping:
            self.end_step()
        return future

    def end_step(self) -> None:
        self.is_stepping = False
        while self.given:
            run, future = self.given.pop(0)
            future.set_result(run())


class Receiver:
    def __init__(self) -> None:
        self.cancelled: list[str] = []

    def cancel(self, sequence_id: str) -> None:
        self.cancelled.append(sequence_id)


class Bench:
    """Fetches of a node whose peers are functions of the test."""

    def __init__(
        self, num_blocks: int = 12, *, is_known: bool = True, num_host_blocks: int = 0
    ) -> None:
        self.manager = BlockManager(num_blocks, BLOCK_SIZE, num_host_blocks=num_host_blocks)
        self.receiver = Receiver()
        self.loop = InlineLoop()
        self.estimate = estimate = FetchEstimate()
        estimate.computed(1000, 1, 1000.0)
        if is_known:
            estimate.reached(HOLDER)
            estimate.fetched(HOLDER, 1000, LATENCY_SECONDS + 0.1, monotonic())
        self.fetches = PrefixFetches(US, self.manager, estimate, lambda address: None)
        self.fetches.bind(cast("Any", self.loop), cast("Any", self.receiver), lambda: "here:1")
        self.restore_seconds: list[float] = []

    async def fetch(
        self,
        answer: Callable[[SequenceRequest], Any],
        prompt: range = PROMPT,
        num_more_tokens: int = 0,
    ) -> None:
        """`answer` does what the holder does."""

        class Stub:
            async def FetchPrefix(stub, request: Any) -> None:
                self.restore_seconds.append(request.restore_seconds_per_token)
                await answer(decode_sequence(request.sequence))

        self.fetches._stub = lambda address: cast("Any", Stub())  # type: ignore[method-assign]
        self.sequence = make_sequence(prompt)
        holder = PrefixHolder(HOLDER, "there:1", len(prompt), num_more_tokens)
        await self.fetches.fetch(self.sequence, holder)
        self.manager.check_integrity()


def test_what_arrives_is_found_by_the_prompt_that_waits_for_it() -> None:
    bench = Bench()

    async def give(prefix: SequenceRequest) -> None:
        shorter = replace(prefix, prompt_token_ids=prefix.prompt_token_ids[: 4 * BLOCK_SIZE])
        blocks = await bench.fetches.incoming.reserve(shorter, "d0")
        assert len(blocks.block_ids) == 4
        await bench.fetches.incoming.start(prefix.sequence_id, 0)

    asyncio.run(bench.fetch(give))
    assert bench.fetches.stats.num_tokens == 4 * BLOCK_SIZE
    assert 0 < bench.restore_seconds[0] < 1, "of each token, which takes a second to compute"
    assert bench.manager.allocate(bench.sequence, len(PROMPT))
    assert bench.sequence.num_computed_tokens == 4 * BLOCK_SIZE
    assert bench.receiver.cancelled == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda prefix: replace(prefix, prompt_token_ids=prefix.prompt_token_ids[:-1]),
        lambda prefix: replace(prefix, prompt_token_ids=prefix.prompt_token_ids[::-1]),
        lambda prefix: replace(prefix, prompt_token_ids=prefix.prompt_token_ids * 2),
        lambda prefix: replace(prefix, cache_salt=b"another tenant"),
    ],
    ids=["part of a block", "other tokens", "more than was asked", "another tenant"],
)
def test_another_prefix_than_was_asked_for_gets_no_blocks(
    spoil: Callable[[SequenceRequest], SequenceRequest],
) -> None:
    bench = Bench()

    async def give(prefix: SequenceRequest) -> None:
        with pytest.raises(TransferFailed):
            await bench.fetches.incoming.reserve(spoil(prefix), "d0")
        with pytest.raises(Cancelled):
            await bench.fetches.incoming.reserve(replace(prefix, sequence_id="another"), "d0")
        with pytest.raises(Cancelled):
            await bench.fetches.incoming.start(prefix.sequence_id, 0)
        bench.fetches.incoming.on_transfer_failed(prefix.sequence_id, TransferFailed("Refused."))

    asyncio.run(bench.fetch(give))
    assert bench.fetches.stats.num_failed == 1
    assert bench.manager.num_free_blocks == bench.manager.num_blocks
    assert len(bench.receiver.cancelled) == 1


def test_without_room_nothing_is_fetched() -> None:
    bench = Bench(num_blocks=3)

    async def give(prefix: SequenceRequest) -> None:
        with pytest.raises(Overloaded):
            await bench.fetches.incoming.reserve(prefix, "d0")
        raise Overloaded("There are no blocks.")

    asyncio.run(bench.fetch(give))
    assert bench.fetches.stats.num_failed == 1
    assert not bench.estimate.is_avoided(HOLDER, monotonic()), "the next prompt may find room"


def test_blocks_that_may_still_be_written_are_kept_until_the_transfer_ends() -> None:
    bench = Bench()
    names: list[str] = []

    async def give(prefix: SequenceRequest) -> None:
        names.append(prefix.sequence_id)
        await bench.fetches.incoming.reserve(prefix, "d0")
        error: ServingError = TransferFailed("A digest differs.")
        bench.fetches.incoming.on_transfer_failed(prefix.sequence_id, error)

    asyncio.run(bench.fetch(give))
    assert bench.manager.num_referenced_blocks == 5, "quarantined"
    bench.fetches.incoming.release(names[0])
    assert bench.manager.num_free_blocks == bench.manager.num_blocks
    assert not bench.manager.match_prefix(bench.sequence.block_hashes)


def test_nothing_is_asked_for_what_is_here() -> None:
    bench = Bench()
    here = make_sequence(PROMPT)
    compute(bench.manager, here)

    async def give(prefix: SequenceRequest) -> None:
        raise AssertionError("It was asked.")

    asyncio.run(bench.fetch(give))
    assert bench.fetches.stats == FetchStats()


def test_what_our_host_memory_has_saves_nothing_though_it_is_moved() -> None:
    bench = Bench(num_host_blocks=16)
    here = make_sequence(range(3 * BLOCK_SIZE))
    compute(bench.manager, here)
    bench.manager.preempt(here)
    assert bench.manager.host is not None
    (save,) = bench.manager.host.take_copies()
    bench.manager.host.end(save, [7] * len(save.entries))
    filler = make_sequence(range(9000, 9000 + 12 * BLOCK_SIZE))
    assert bench.manager.allocate(filler, filler.num_tokens)
    bench.manager.free(filler)

    async def give(prefix: SequenceRequest) -> None:
        blocks = await bench.fetches.incoming.reserve(prefix, "d0")
        assert blocks.num_held_blocks == 0
        await bench.fetches.incoming.start(prefix.sequence_id, 0)

    asyncio.run(bench.fetch(give))
    moving = 5 * BLOCK_SIZE * 0.1 / 1000
    spare = 2 * BLOCK_SIZE * 1.0 - FIXED_SECONDS - moving
    assert bench.restore_seconds == [pytest.approx(spare / (5 * BLOCK_SIZE))]


def test_the_first_contact_asks_for_one_block_and_nobody_waits() -> None:
    bench = Bench(is_known=False)
    asked: list[SequenceRequest] = []

    async def give(prefix: SequenceRequest) -> None:
        asked.append(prefix)
        await bench.fetches.incoming.reserve(prefix, "d0")
        await bench.fetches.incoming.start(prefix.sequence_id, 0)

    async def run() -> None:
        await bench.fetch(give)
        assert not asked
        await until(lambda: bench.fetches.stats.num_explored == 1)
        assert bench.estimate.is_known(HOLDER)
        assert len(asked[0].prompt_token_ids) == BLOCK_SIZE
        assert bench.restore_seconds[0] >= 1.0, "it may be in host memory, and nobody waits"
        await bench.fetch(give)
        assert bench.fetches.stats.num_waited == 1

    asyncio.run(run())
    assert bench.manager.num_cached(bench.sequence.block_hashes) == 5


def test_a_first_contact_that_finds_all_of_it_computed_makes_the_next_prompt_wait() -> None:
    """The step of the prompt ends before there are blocks for what is fetched beside it."""
    bench = Bench(num_blocks=24, is_known=False)
    other = range(900, 900 + 5 * BLOCK_SIZE + 1)

    async def give(prefix: SequenceRequest) -> None:
        await bench.fetches.incoming.reserve(prefix, "d0")
        await bench.fetches.incoming.start(prefix.sequence_id, 0)

    async def run() -> None:
        await bench.fetch(give)
        bench.loop.is_stepping = True
        compute(bench.manager, bench.sequence)
        bench.loop.end_step()
        await until(lambda: bench.fetches.stats.num_explored == 1)
        await bench.fetch(give, other)

    asyncio.run(run())
    assert bench.fetches.stats.num_waited == 1
    assert bench.fetches.stats.num_tokens == 5 * BLOCK_SIZE


def test_a_prompt_goes_on_when_all_has_arrived_though_the_engine_is_at_a_step() -> None:
    bench = Bench()

    async def give(prefix: SequenceRequest) -> None:
        await bench.fetches.incoming.reserve(prefix, "d0")
        bench.loop.is_stepping = True
        await bench.fetches.incoming.start(prefix.sequence_id, 0)

    async def run() -> None:
        async with asyncio.timeout(10):
            await bench.fetch(give)
        queued = bench.loop.call(lambda: bench.manager.num_cached(bench.sequence.block_hashes))
        bench.loop.end_step()
        assert queued.result() == 5, "what is queued behind it finds it"

    asyncio.run(run())


def test_the_engine_is_not_asked_where_nothing_could_be_worthwhile() -> None:
    bench = Bench()
    bench.estimate.fetched(HOLDER, 1_000_000, 1e9, monotonic())
    bench.loop.is_stepping = True

    async def give(prefix: SequenceRequest) -> None:
        raise AssertionError("It was asked.")

    asyncio.run(bench.fetch(give))
    assert bench.fetches.stats == FetchStats(num_not_worthwhile=1)


def test_the_engine_is_not_asked_where_little_is_believed_to_be_lacking() -> None:
    """As in a chat: the holder has the last answer, and we have all before it."""
    bench = Bench()
    bench.estimate.computed(1_000_000, 1, 1.0)
    assert bench.estimate.pays(HOLDER, Lacking(80, 80), monotonic())
    bench.loop.is_stepping = True

    async def give(prefix: SequenceRequest) -> None:
        raise AssertionError("It was asked.")

    asyncio.run(bench.fetch(give, num_more_tokens=1))
    assert bench.fetches.stats == FetchStats(num_not_worthwhile=1)


def test_a_holder_that_has_lost_it_is_asked_for_the_next_prompt() -> None:
    bench = Bench()

    async def refuse(prefix: SequenceRequest) -> None:
        raise NodeUnavailable("Nothing of this prefix is cached here.", reason="not_cached")

    async def vanish(prefix: SequenceRequest) -> None:
        raise NodeUnavailable("It is gone.")

    asyncio.run(bench.fetch(refuse))
    assert bench.fetches.stats.num_failed == 1
    assert not bench.estimate.is_avoided(HOLDER, monotonic())
    asyncio.run(bench.fetch(vanish))
    assert bench.estimate.is_avoided(HOLDER, monotonic())


def test_a_prompt_whose_fetch_is_cut_off_with_its_channel_is_not_given_up() -> None:
    """So many other holders were asked meanwhile that this one's channel was closed."""
    bench = Bench()

    async def cut_off(prefix: SequenceRequest) -> None:
        raise asyncio.CancelledError

    asyncio.run(bench.fetch(cut_off))
    assert bench.fetches.stats.num_failed == 1
    assert not bench.estimate.is_avoided(HOLDER, monotonic())


def test_a_prompt_that_ends_ends_its_fetch() -> None:
    bench = Bench()

    async def scenario() -> None:
        is_asked = asyncio.Event()

        async def never(prefix: SequenceRequest) -> None:
            is_asked.set()
            await asyncio.Event().wait()

        fetching = asyncio.create_task(bench.fetch(never))
        await is_asked.wait()
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching

    asyncio.run(scenario())
    assert bench.fetches.stats.num_failed == 0
    assert len(bench.receiver.cancelled) == 1


def test_what_did_not_come_in_time_is_not_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(is_known=False)
    clock = ManualClock()
    bench.fetches._clock = clock
    bench.estimate.reached(HOLDER)
    monkeypatch.setattr(FetchEstimate, "limit_seconds", lambda self, num_tokens: 0.05)

    async def never(prefix: SequenceRequest) -> None:
        clock.advance(1000.0)
        await asyncio.Event().wait()

    asyncio.run(bench.fetch(never))
    later = clock() + AVOID_SECONDS
    assert bench.fetches.stats == FetchStats(num_failed=1, waited_seconds=1000.0)
    assert not bench.estimate.is_known(HOLDER)
    bench.estimate.reached(HOLDER)
    assert not bench.estimate.pays(HOLDER, Lacking(80, 80), later)


def test_blocks_that_come_when_nobody_waits_for_them_any_more_go_back() -> None:
    """The engine's thread was reserving them when the fetch was given up."""
    bench = Bench()
    bench.loop.is_stepping = True

    async def scenario() -> None:
        sequence = make_sequence(PROMPT)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        bench.fetches.incoming.expect("f", IncomingPrefix(sequence, 4, done))
        prefix = replace(
            sequence.request,
            sequence_id="f",
            prompt_token_ids=sequence.prompt_token_ids[: 4 * BLOCK_SIZE],
        )
        asking = asyncio.create_task(bench.fetches.incoming.reserve(prefix, "d0"))
        await until(lambda: bool(bench.loop.given))
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        bench.loop.end_step()
        assert bench.manager.num_free_blocks == 12

    asyncio.run(scenario())


def test_channels_to_holders_that_came_and_went_do_not_gather() -> None:
    closed: list[str] = []

    class Channel:
        def __init__(self, address: str) -> None:
            self.address = address

        def unary_unary(self, *_: Any, **__: Any) -> None: ...
        def stream_stream(self, *_: Any, **__: Any) -> None: ...

        async def close(self) -> None:
            closed.append(self.address)

    async def scenario() -> None:
        fetches = Bench().fetches
        fetches._channels = HolderChannels(cast("Any", Channel))
        for index in range(2 * MAX_CHANNELS):
            fetches._stub("kept:1")
            fetches._stub(f"node-{index}:1")
        await asyncio.sleep(0)
        assert len(closed) == MAX_CHANNELS + 1
        assert "kept:1" not in closed
        await fetches.close()
        assert len(closed) == 2 * MAX_CHANNELS + 1

    asyncio.run(scenario())
