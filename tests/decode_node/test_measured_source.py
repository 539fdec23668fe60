"""Hand-offs that are only measured take blocks that hold nothing, and run nowhere."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest

from cluster.errors import Cancelled, NodeUnavailable, Overloaded, TransferFailed
from decode_node.measured_source import MeasuredSource
from engine.block_manager import BlockManager
from tests.kv_twins import ManualClock, until
from tests.sequences import BLOCK_SIZE, compute, make_request, make_sequence

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from cluster.request import SequenceRequest

NUM_BLOCKS = 8


class InlineLoop:
    """Runs what it is given at once."""

    def call(self, run: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(run())
        return future


class Others:
    """The node's own source: notes what it is asked."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    async def reserve(self, request: SequenceRequest, gateway_id: str) -> str:
        self.told.append(("reserve", request.sequence_id))
        return "theirs"

    def start(self, sequence_id: str, first_token_id: int) -> Awaitable[None]:
        self.told.append(("start", sequence_id))
        return asyncio.sleep(0)

    def release(self, sequence_id: str) -> None:
        self.told.append(("release", sequence_id))

    def may_recompute(self, sequence_id: str, num_good_blocks: int) -> bool:
        self.told.append(("may recompute", sequence_id))
        return True

    def recompute(self, sequence_id: str, num_good_blocks: int) -> None:
        self.told.append(("recompute", sequence_id))

    def on_transfer_failed(self, sequence_id: str, error: object) -> None:
        self.told.append(("failed", sequence_id))

    def on_transfer_withdrawn(self, sequence_id: str) -> None:
        self.told.append(("withdrawn", sequence_id))


class Bench:
    def __init__(self) -> None:
        self.manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.others = Others()
        self.clock = ManualClock()
        self.source = MeasuredSource(
            self.manager, cast("Any", self.others), cast("Any", InlineLoop()), self.clock
        )

    def cache(self, num_blocks: int) -> None:
        """So many blocks hold what a prompt can hit."""
        sequence = make_sequence(range(num_blocks * BLOCK_SIZE))
        compute(self.manager, sequence)
        self.manager.free(sequence)
        assert self.manager.num_cached_blocks == num_blocks


def scratch(num_blocks: int) -> SequenceRequest:
    return replace(make_request([0] * (num_blocks * BLOCK_SIZE)), sequence_id="measured")


def run(body: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def scenario() -> None:
        bench = Bench()
        await body(bench)
        bench.manager.check_integrity()
        assert bench.manager.num_held_blocks == 0

    asyncio.run(scenario())


def test_the_clock_runs_from_the_ticket_to_the_start_and_the_blocks_are_free_then() -> None:
    async def body(bench: Bench) -> None:
        measured = bench.source.expect("measured", 4)
        bench.clock.advance(5.0)
        blocks = await bench.source.reserve(scratch(3), "g")
        assert (len(blocks.block_ids), blocks.num_held_blocks) == (3, 0)
        bench.clock.advance(0.25)
        await bench.source.start("measured", 0)
        assert await measured.done == 0.25
        assert measured.num_blocks == 3
        assert bench.manager.num_free_blocks == NUM_BLOCKS
        assert bench.manager.num_cached_blocks == 0, "nothing of it can be hit"
        bench.source.forget("measured")
        assert bench.others.told == []

    run(body)


def test_what_is_cached_makes_no_room() -> None:
    async def body(bench: Bench) -> None:
        bench.cache(6)
        assert await bench.source.num_spare_blocks() == 2
        bench.source.expect("measured", 8)
        with pytest.raises(Overloaded):
            await bench.source.reserve(scratch(3), "g")
        await bench.source.reserve(scratch(2), "g")
        assert bench.manager.num_cached_blocks == 6
        bench.source.release("measured")

    run(body)


@pytest.mark.parametrize("num_tokens", [5 * BLOCK_SIZE, BLOCK_SIZE - 1])
def test_another_size_than_was_asked_for_is_refused(num_tokens: int) -> None:
    async def body(bench: Bench) -> None:
        bench.source.expect("measured", 4)
        other = replace(make_request([0] * num_tokens), sequence_id="measured")
        with pytest.raises(TransferFailed):
            await bench.source.reserve(other, "g")

    run(body)


def test_a_failure_is_told_at_once_and_blocks_stay_until_nothing_writes() -> None:
    async def body(bench: Bench) -> None:
        measured = bench.source.expect("measured", 4)
        await bench.source.reserve(scratch(3), "g")
        assert not bench.source.may_recompute("measured", 1)
        bench.source.on_transfer_failed("measured", TransferFailed("lost"))
        with pytest.raises(TransferFailed):
            await measured.done
        assert bench.manager.num_held_blocks == 3
        bench.source.release("measured")

    run(body)


def test_a_sender_that_withdraws_is_a_failure() -> None:
    async def body(bench: Bench) -> None:
        measured = bench.source.expect("measured", 4)
        bench.source.on_transfer_withdrawn("measured")
        with pytest.raises(NodeUnavailable):
            await measured.done

    run(body)


def test_nothing_starts_that_nobody_waits_for() -> None:
    async def body(bench: Bench) -> None:
        bench.source.expect("measured", 4)
        await bench.source.reserve(scratch(3), "g")
        bench.source.forget("measured")
        with pytest.raises(Cancelled):
            await bench.source.start("measured", 0)
        bench.source.on_transfer_failed("measured", Cancelled("late"))
        bench.source.release("measured")

    run(body)


def test_every_other_sequence_is_the_nodes_own() -> None:
    async def body(bench: Bench) -> None:
        source = bench.source
        source.expect("measured", 4)
        request = replace(make_request(range(8)), sequence_id="a")
        assert cast("Any", await source.reserve(request, "g")) == "theirs"
        starting = source.start("a", 7)
        assert bench.others.told[-1] == ("start", "a"), "in this call: its engine need not wait"
        await starting
        assert source.may_recompute("a", 1)
        source.recompute("a", 1)
        source.on_transfer_failed("a", TransferFailed("x"))
        source.on_transfer_withdrawn("a")
        source.release("a")
        steps = [step for step, _ in bench.others.told]
        assert steps == [
            "reserve", "start", "may recompute", "recompute", "failed", "withdrawn", "release",
        ]  # fmt: skip

    run(body)


def test_blocks_that_come_when_the_measurement_was_given_up_go_back() -> None:
    """The engine's thread was at it already."""
    given: list[tuple[Callable[[], Any], Future[Any]]] = []

    class LateLoop:
        def call(self, run: Callable[[], Any]) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_running_or_notify_cancel()
            given.append((run, future))
            return future

    async def scenario() -> None:
        bench = Bench()
        bench.source._loop = cast("Any", LateLoop())
        prompt = replace(make_request(range(BLOCK_SIZE)), sequence_id="m")
        bench.source.expect("m", 1)
        asking = asyncio.create_task(bench.source.reserve(prompt, "d0"))
        await until(lambda: bool(given))
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        while given:
            run, future = given.pop(0)
            future.set_result(run())
        assert bench.manager.num_free_blocks == NUM_BLOCKS

    asyncio.run(scenario())
