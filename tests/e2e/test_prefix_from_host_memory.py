"""A prefix that its holder has in host memory alone reaches another node, or costs time only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import pytest

from cluster.prefix_hash import hash_blocks, root_hash
from cluster.request import SamplingParams
from prefill_node.fetch_estimate import FetchEstimate
from prefill_node.node import PrefillNode
from tests.checkpoints import POCKET_MODEL
from tests.e2e.split_pair import make_request, split_pair
from tests.kv_twins import until
from tests.sequences import make_sequence

if TYPE_CHECKING:
    from cluster.prefix_hash import BlockHash
    from cluster.request import SequenceRequest
    from engine.block_manager import BlockManager
    from engine.host_blocks import HostBlocks
    from engine.restores import RestoreStats
    from prefill_node.prefix_fetches import FetchStats
    from tests.checkpoints import OpenEngine
    from tests.e2e.split_pair import SplitPair

PairOf = Callable[[], AbstractAsyncContextManager["SplitPair"]]
BLOCK_SIZE = 16
NUM_BLOCKS = 16  # of the holder's pool
NUM_WHOLE = 5  # blocks of the prompt
NUM_TOKENS = 8
PROMPT = [(7 * index) % 90 + 5 for index in range(NUM_WHOLE * BLOCK_SIZE + 6)]
OTHER = [(11 * index) % 90 + 5 for index in range(200)]
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0, ignore_eos=True)
SECONDS_PER_TOKEN = 1.0


@pytest.fixture(autouse=True)
def always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pocket model is computed sooner than anything is fetched."""
    monkeypatch.setattr(FetchEstimate, "is_known", lambda self, holder: True)
    monkeypatch.setattr(FetchEstimate, "pays", lambda self, holder, lacking, now: True)
    monkeypatch.setattr(
        FetchEstimate,
        "restore_seconds_per_token",
        lambda self, holder, lacking, now: SECONDS_PER_TOKEN,
    )


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def pair_of(open_engine: OpenEngine, request: pytest.FixtureRequest) -> PairOf:
    """The decode node has a small pool, and host memory below it."""
    options = {"device": request.param, "max_model_len": 256}
    prefill = open_engine(POCKET_MODEL, num_gpu_blocks_override=200, **options)
    decode = open_engine(
        POCKET_MODEL, num_gpu_blocks_override=NUM_BLOCKS, kv_offloading_size=0.01, **options
    )
    return lambda: split_pair(prefill, decode, fetch_prefixes=True)


def prompt_of(salt: bytes) -> SequenceRequest:
    return make_request(PROMPT, GREEDY, salt=salt)


def manager_of(pair: SplitPair) -> BlockManager:
    return pair.decode.node.parts.engine.block_manager


def host_of(pair: SplitPair) -> HostBlocks:
    host = manager_of(pair).host
    assert host is not None
    return host


def restored(pair: SplitPair) -> RestoreStats:
    return pair.decode.node.parts.engine.restores.stats


def fetched(pair: SplitPair) -> FetchStats:
    node = pair.prefill.node
    assert isinstance(node, PrefillNode)
    assert node.fetches is not None
    return node.fetches.stats


async def computed(pair: SplitPair) -> list[int]:
    """What an undisturbed run says: of another tenant, so nothing of it is a hit."""
    (answer,) = await pair.split([prompt_of(b"undisturbed")])
    return answer.token_ids


async def leave_in_host_memory(pair: SplitPair, salt: bytes) -> None:
    """The holder computes the prompt, and others until its pool has nothing of it any more."""
    await pair.warm([], [prompt_of(salt)])
    for turn in range(2):
        await pair.warm([], [make_request(OTHER, GREEDY, salt=b"other %d" % turn)])
    hashes = hashes_of(pair, salt)
    assert manager_of(pair).match_prefix(hashes) == []
    assert manager_of(pair).num_cached(hashes) == NUM_WHOLE, "announced to the cluster as before"


def hashes_of(pair: SplitPair, salt: bytes) -> list[BlockHash]:
    root = root_hash(pair.decode.node.info.compatibility_hash, salt)
    return hash_blocks(PROMPT, BLOCK_SIZE, root)


async def ask(pair: SplitPair, salt: bytes) -> tuple[list[int], int]:
    """Tokens of the prompt through both nodes, and how many of its own were cached."""
    (answer,) = await pair.split([prompt_of(salt)], num_tokens_held=len(PROMPT))
    return answer.token_ids, answer.num_cached_tokens


def test_a_prefix_in_the_holders_host_memory_alone_is_not_computed_again(pair_of: PairOf) -> None:
    async def run() -> None:
        async with pair_of() as pair:
            wanted = await computed(pair)
            await leave_in_host_memory(pair, b"tenant")
            before = pair.prefill.node.parts.loop.stats.num_computed_tokens
            tokens, num_cached = await ask(pair, b"tenant")
            assert tokens == wanted
            assert num_cached == NUM_WHOLE * BLOCK_SIZE
            assert pair.prefill.node.parts.loop.stats.num_computed_tokens - before == 6
            assert restored(pair).num_restored == NUM_WHOLE
            assert fetched(pair).num_tokens == NUM_WHOLE * BLOCK_SIZE
            assert fetched(pair).num_failed == 0

    asyncio.run(run())


def test_a_holder_without_room_gives_nothing_and_waits_for_nobody(pair_of: PairOf) -> None:
    async def run() -> None:
        async with pair_of() as pair:
            wanted = await computed(pair)
            await leave_in_host_memory(pair, b"tenant")
            manager, loop = manager_of(pair), pair.decode.node.parts.loop
            running = make_sequence(range(5, 5 + 14 * BLOCK_SIZE), block_size=BLOCK_SIZE)
            taking = loop.call(lambda: manager.allocate(running, running.num_tokens))
            assert await asyncio.wrap_future(taking)
            asking = asyncio.create_task(ask(pair, b"tenant"))
            await until(lambda: fetched(pair).num_failed == 1)
            assert restored(pair).num_without_room == NUM_WHOLE
            assert len(running.block_table) == 14
            loop.call(lambda: manager.free(running))
            assert await asking == (wanted, 0)

    asyncio.run(run())


def test_what_changed_in_host_memory_is_computed(pair_of: PairOf) -> None:
    async def run() -> None:
        async with pair_of() as pair:
            wanted = await computed(pair)
            await leave_in_host_memory(pair, b"tenant")
            copier = pair.decode.node.parts.engine.copier
            assert copier is not None
            third = host_of(pair).tier.match(hashes_of(pair, b"tenant"))[2]
            copier.slots[third.slot, 17] ^= 1
            tokens, num_cached = await ask(pair, b"tenant")
            assert tokens == wanted
            assert num_cached == 2 * BLOCK_SIZE
            assert restored(pair).num_bad == NUM_WHOLE - 2

    asyncio.run(run())


def test_a_fetch_that_is_given_up_while_blocks_are_brought_leaves_nothing(
    pair_of: PairOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FetchEstimate, "limit_seconds", lambda self, num_tokens: 1.0)

    async def run() -> None:
        async with pair_of() as pair:
            wanted = await computed(pair)
            await leave_in_host_memory(pair, b"tenant")
            copier = pair.decode.node.parts.engine.copier
            assert copier is not None
            begun: list[Callable[[], None]] = []
            start = copier.start
            monkeypatch.setattr(copier, "start", lambda *copy: begun.append(lambda: start(*copy)))
            tokens, num_cached = await ask(pair, b"tenant")
            assert tokens == wanted
            assert num_cached == 0
            assert fetched(pair).num_failed == 1
            monkeypatch.setattr(copier, "start", start)
            for carry_on in begun:
                carry_on()
            await until(lambda: restored(pair).num_restored == NUM_WHOLE)

    asyncio.run(run())
