"""Cached prefixes that are given away: held as long as they are read, and no longer."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, cast

import pytest

from cluster.errors import NodeUnavailable, Overloaded, TransferFailed
from cluster.node import Incarnation, NodeId, NodeName
from cluster.request import Handoff
from kv_transfer.sending.prefixes import (
    MAX_GIVEN_AWAY,
    MAX_TO_ONE_PEER,
    HeldPrefix,
    PrefixSender,
)
from tests.sequences import BLOCK_SIZE, make_request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.errors import ServingError
    from cluster.request import SequenceRequest


class Sender:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.opened: dict[str, SequenceRequest] = {}
        self.computed: dict[str, tuple[int, Sequence[int]]] = {}
        self.committed: list[str] = []
        self.stuck: set[str] = set()

    def is_stuck(self, sequence_id: str) -> bool:
        return sequence_id in self.stuck

    def open(self, request: SequenceRequest, handoff: Handoff) -> None:
        if request.sequence_id in self.opened:
            raise ValueError("the sequence is being handed off already")
        self.opened[request.sequence_id] = request

    def chunk_computed(
        self, sequence_id: str, num_tokens: int, block_table: Sequence[int], done: Any
    ) -> None:
        self.computed[sequence_id] = num_tokens, block_table

    def commit(self, sequence_id: str, first_token_id: int) -> None:
        self.committed.append(sequence_id)


class Others:
    """Whose hand-offs the same sender carries."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def on_committed(self, sequence_id: str) -> None:
        self.told.append(("committed", sequence_id))

    def on_failed(self, sequence_id: str, error: ServingError) -> None:
        self.told.append(("failed", sequence_id))

    def on_sources_free(self, sequence_id: str) -> None:
        self.told.append(("free", sequence_id))


class Bench:
    def __init__(self, num_cached: int = 3) -> None:
        self.num_cached = num_cached
        self.num_held = 0
        self.seconds: list[float] = []
        self.others = Others()
        self.sender = Sender()
        self.prefixes = PrefixSender(self.hold, BLOCK_SIZE, self.others)
        self.prefixes.bind(cast("Any", self.sender))

    async def hold(self, prefix: SequenceRequest, seconds_per_token: float) -> HeldPrefix:
        self.num_held += 1
        self.seconds.append(seconds_per_token)
        return HeldPrefix(tuple(range(self.num_cached)), self.release)

    def release(self) -> None:
        self.num_held -= 1

    def give(self, *peers: str) -> list[str]:
        """One prefix to each; the names of their sequences."""
        names = []
        for peer in peers:
            prefix, handoff = asked(peer=peer)
            asyncio.run(self.prefixes.send(prefix, handoff, 0.5))
            names.append(prefix.sequence_id)
        return names

    def refuses(self, peer: str) -> bool:
        try:
            self.give(peer)
        except Overloaded:
            return True
        return False


def asked(num_blocks: int = 5, *, peer: str = "p0") -> tuple[SequenceRequest, Handoff]:
    to = NodeId(NodeName(peer), Incarnation(1))
    handoff = Handoff(
        transfer_id=os.urandom(16), attempt=0, decode=to, decode_address="p:1", gateway_id="p0"
    )
    return make_request(range(num_blocks * BLOCK_SIZE)), handoff


def test_what_is_cached_is_sent_whole_and_held_until_nothing_reads_it() -> None:
    bench = Bench()
    prefix, handoff = asked()
    assert asyncio.run(bench.prefixes.send(prefix, handoff, 0.5)) == 3 * BLOCK_SIZE
    name = prefix.sequence_id
    assert bench.sender.opened[name].prompt_token_ids == prefix.prompt_token_ids[: 3 * BLOCK_SIZE]
    assert bench.sender.computed[name] == (3 * BLOCK_SIZE, (0, 1, 2))
    assert bench.sender.committed == [name]
    assert bench.seconds == [0.5], "what it may take to bring them out of host memory"
    bench.prefixes.on_failed(name, TransferFailed("It broke."))
    assert bench.num_held == 1, "a send may still read them"
    bench.prefixes.on_sources_free(name)
    assert bench.num_held == bench.prefixes.num_given_away == 0
    assert bench.others.told == []


def test_nothing_is_opened_for_what_is_not_cached() -> None:
    bench = Bench(num_cached=0)
    with pytest.raises(NodeUnavailable, match="cached"):
        asyncio.run(bench.prefixes.send(*asked(), 0.5))
    assert bench.num_held == 0
    assert not bench.sender.opened


def test_the_same_prefix_is_not_sent_twice_at_once() -> None:
    bench = Bench()
    prefix, handoff = asked()
    asyncio.run(bench.prefixes.send(prefix, handoff, 0.5))
    with pytest.raises(NodeUnavailable):
        asyncio.run(bench.prefixes.send(prefix, handoff, 0.5))
    assert bench.num_held == 1


def test_what_cannot_be_sent_for_a_reason_nobody_foresaw_is_not_held_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("nobody foresaw this")

    bench = Bench()
    monkeypatch.setattr(bench.sender, "open", broken)
    with pytest.raises(RuntimeError):
        asyncio.run(bench.prefixes.send(*asked(), 0.5))
    assert bench.num_held == bench.prefixes.num_given_away == 0


def test_no_more_are_given_away_at_once_than_is_allowed() -> None:
    bench = Bench()
    bench.give(*(f"p{number}" for number in range(MAX_GIVEN_AWAY)))
    assert bench.refuses("another")
    assert bench.num_held == MAX_GIVEN_AWAY


def test_a_peer_that_reads_slowly_leaves_prefixes_to_the_others() -> None:
    bench = Bench()
    first, *_ = bench.give(*["slow"] * MAX_TO_ONE_PEER)
    assert bench.refuses("slow")
    bench.give("another")
    bench.prefixes.on_sources_free(first)
    assert not bench.refuses("slow")


def test_a_prefix_that_is_looked_for_counts_as_its_peers() -> None:
    async def scenario() -> None:
        bench = Bench()
        found = asyncio.Event()

        async def hold(prefix: SequenceRequest, seconds_per_token: float) -> HeldPrefix:
            await found.wait()
            return HeldPrefix((), lambda: None)

        bench.prefixes = PrefixSender(hold, BLOCK_SIZE)
        bench.prefixes.bind(cast("Any", bench.sender))
        asking = [
            asyncio.ensure_future(bench.prefixes.send(*asked(), 0.5))
            for _ in range(MAX_TO_ONE_PEER + 1)
        ]
        await asyncio.sleep(0)
        found.set()
        errors = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(error) for error in errors[-2:]] == [NodeUnavailable, Overloaded]
        assert bench.prefixes.num_given_away == 0

    asyncio.run(scenario())


def test_what_is_stuck_stays_held_and_keeps_no_other_prefix_here() -> None:
    """Whatever still reads it may never end."""
    bench = Bench()
    stuck = bench.give(*["stuck"] * MAX_TO_ONE_PEER)
    stuck += bench.give(*["stuck too"] * (MAX_GIVEN_AWAY - MAX_TO_ONE_PEER))
    assert bench.refuses("another")
    bench.sender.stuck.update(stuck)
    bench.give("another", "stuck")
    assert bench.num_held == MAX_GIVEN_AWAY + 2
    for name in stuck:
        bench.prefixes.on_sources_free(name)
    assert bench.num_held == bench.prefixes.num_given_away == 2


def test_hand_offs_of_others_are_reported_to_them() -> None:
    bench = Bench()
    bench.prefixes.on_committed("theirs")
    bench.prefixes.on_failed("theirs", TransferFailed("It broke."))
    bench.prefixes.on_sources_free("theirs")
    assert bench.others.told == [("committed", "theirs"), ("failed", "theirs"), ("free", "theirs")]
