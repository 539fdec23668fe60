"""Spare blocks are given to a decode node that measures, and nothing that is cached or wanted."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, cast

import pytest

from cluster.codec import encode_handoff, encode_sequence
from cluster.errors import InvalidRequest, NodeUnavailable, Overloaded
from cluster.node import Incarnation, NodeId, NodeName
from cluster.proto import node_pb2 as pb
from cluster.request import Handoff
from engine.block_manager import BlockManager
from kv_transfer import idle
from kv_transfer.plain_copy import PlainListener
from prefill_node import measuring
from prefill_node.measuring import ScratchSender
from tests.kv_transfer.sending.test_prefixes import Others, Sender
from tests.sequences import BLOCK_SIZE, compute, make_request, make_sequence

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

NUM_BLOCKS = 12


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "IDLE_SECONDS", 0.02)
    monkeypatch.setattr(measuring, "IDLE_SECONDS", 0.02)


class InlineLoop:
    def call(self, run: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(run())
        return future


class Bench:
    def __init__(self) -> None:
        self.is_idle = True
        self.manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.others, self.sender = Others(), Sender()
        self.scratch = ScratchSender(
            self.manager,
            cast("Any", InlineLoop()),
            cast("Any", self.others),
            is_idle=lambda: self.is_idle,
        )
        self.scratch.bind(cast("Any", self.sender))

    async def ask(self, num_blocks: int) -> int:
        """How many tokens are sent."""
        handoff = Handoff(
            transfer_id=os.urandom(16),
            attempt=0,
            decode=NodeId(NodeName("d0"), Incarnation(1)),
            decode_address="d:1",
            gateway_id="d0",
        )
        sequence = make_request([0] * (num_blocks * BLOCK_SIZE))
        asked = pb.SendScratchRequest(
            sequence=encode_sequence(sequence), handoff=encode_handoff(handoff)
        )
        reply = await self.scratch.SendScratch(asked, None)
        return int(reply.num_tokens)

    def end_all(self) -> None:
        for sequence_id in list(self.sender.opened):
            self.scratch.events.on_sources_free(sequence_id)


def run(body: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def scenario() -> None:
        bench = Bench()
        await body(bench)
        bench.end_all()
        assert bench.manager.num_held_blocks == 0
        bench.manager.check_integrity()

    asyncio.run(scenario())


def test_half_of_what_is_spare_at_most_is_sent_and_comes_back() -> None:
    async def body(bench: Bench) -> None:
        assert await bench.ask(NUM_BLOCKS) == NUM_BLOCKS // 2 * BLOCK_SIZE
        ((_, block_table),) = bench.sender.computed.values()
        assert len(set(block_table)) == NUM_BLOCKS // 2
        assert bench.manager.num_held_blocks == NUM_BLOCKS // 2
        bench.end_all()
        assert await bench.ask(2) == 2 * BLOCK_SIZE

    run(body)


def test_what_is_cached_is_neither_sent_nor_lost() -> None:
    async def body(bench: Bench) -> None:
        cached = make_sequence(range(10 * BLOCK_SIZE))
        compute(bench.manager, cached)
        ids = set(cached.block_table)
        bench.manager.free(cached)
        assert await bench.ask(NUM_BLOCKS) == BLOCK_SIZE
        ((_, block_table),) = bench.sender.computed.values()
        assert not ids & set(block_table)
        assert bench.manager.num_cached_blocks == 10

    run(body)


def test_without_a_spare_block_it_is_refused() -> None:
    async def body(bench: Bench) -> None:
        full = make_sequence(range(NUM_BLOCKS * BLOCK_SIZE))
        compute(bench.manager, full)
        with pytest.raises(Overloaded) as refused:
            await bench.ask(2)
        assert refused.value.reason == "no_blocks"
        bench.manager.free(full)

    run(body)


def test_a_node_with_prompts_refuses_and_takes_the_next_when_it_is_idle() -> None:
    async def body(bench: Bench) -> None:
        bench.is_idle = False
        with pytest.raises(Overloaded) as refused:
            await bench.ask(2)
        assert refused.value.reason == "busy"
        bench.is_idle = True
        assert await bench.ask(2)

    run(body)


def test_the_next_waits_until_nothing_reads_the_last_ones_blocks() -> None:
    async def body(bench: Bench) -> None:
        await bench.ask(2)
        with pytest.raises(Overloaded) as refused:
            await bench.ask(2)
        assert refused.value.reason == "measuring"
        asking = asyncio.create_task(bench.ask(2))
        await asyncio.sleep(0)
        bench.end_all()
        assert await asking

    run(body)


def test_reports_on_other_sequences_are_passed_on() -> None:
    async def body(bench: Bench) -> None:
        bench.scratch.events.on_committed("theirs")
        bench.scratch.events.on_sources_free("theirs")
        assert bench.others.told == [("committed", "theirs"), ("free", "theirs")]

    run(body)


def test_a_plain_copy_that_nobody_takes_is_a_typed_error() -> None:
    async def body(bench: Bench) -> None:
        listener = PlainListener("127.0.0.1")
        listener.close()
        asked = pb.SendPlainRequest(host="127.0.0.1", port=listener.port, nonce=listener.nonce)
        with pytest.raises(NodeUnavailable):
            await bench.scratch.SendPlain(asked, None)
        with pytest.raises(InvalidRequest):
            await bench.scratch.SendPlain(pb.SendPlainRequest(nonce=b"short"), None)

    run(body)
