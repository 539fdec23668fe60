"""What a prefill node fetches from another node's cache changes no token, nor does a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import pytest

from cluster.errors import NodeUnavailable
from cluster.request import Handoff, SamplingParams
from kv_transfer.sending.prefixes import HeldPrefix, PrefixSender
from kv_transfer.sending.sender import KVSender
from prefill_node.fetch_estimate import FetchEstimate
from prefill_node.node import PrefillNode
from tests.e2e.split_pair import make_request, split_pair
from tests.kv_twins import until

if TYPE_CHECKING:
    import torch

    from cluster.request import SequenceRequest
    from kv_transfer.transports.base import Endpoint, Transport
    from prefill_node.prefix_fetches import FetchStats
    from tests.checkpoints import OpenEngine
    from tests.e2e.split_pair import Answer, SplitPair

PairOf = Callable[[], AbstractAsyncContextManager["SplitPair"]]
NUM_TOKENS = 8
PROMPT = [(7 * index) % 90 + 5 for index in range(70)]  # four whole blocks and six tokens
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0, ignore_eos=True)


@pytest.fixture(autouse=True)
def always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are computed sooner than anything is fetched."""
    monkeypatch.setattr(FetchEstimate, "is_known", lambda self, holder: True)
    monkeypatch.setattr(
        FetchEstimate, "pays", lambda self, holder, lacking, now: lacking.num_computed_tokens > 0
    )
    monkeypatch.setattr(
        FetchEstimate, "restore_seconds_per_token", lambda self, holder, lacking, now: 1.0
    )


def prompt_of(salt: bytes) -> SequenceRequest:
    return make_request(PROMPT, GREEDY, salt=salt)


def fetched(pair: SplitPair) -> FetchStats:
    node = pair.prefill.node
    assert isinstance(node, PrefillNode)
    assert node.fetches is not None
    return node.fetches.stats


async def ask(pair: SplitPair, salt: bytes, held: int = len(PROMPT)) -> Answer:
    (answer,) = await pair.split([prompt_of(salt)], num_tokens_held=held)
    return answer


async def computed(pair: SplitPair, salt: bytes) -> list[int]:
    (answer,) = await pair.split([prompt_of(salt)])
    return answer.token_ids


@pytest.fixture
def pair_of(open_engine: OpenEngine) -> PairOf:
    engines = [open_engine("qwen3", max_model_len=256) for _ in range(2)]
    return lambda: split_pair(*engines, fetch_prefixes=True)


def test_a_prefix_that_the_decode_node_has_is_not_computed_again(pair_of: PairOf) -> None:
    async def run() -> None:
        async with pair_of() as pair:
            wanted = await computed(pair, b"first")
            await pair.warm([], [prompt_of(b"second")])
            answer = await ask(pair, b"second")
            assert answer.token_ids == wanted
            assert answer.num_cached_tokens == 64
            assert fetched(pair).num_tokens == 64
            # Both have it now: nothing is asked.
            again = await ask(pair, b"second")
            assert again.token_ids == wanted
            assert fetched(pair).num_waited == 1

    asyncio.run(run())


def test_the_second_prompt_waits_and_the_first_one_only_connects(
    pair_of: PairOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(FetchEstimate, "limit_seconds", lambda self, num_tokens: 60.0)
    monkeypatch.setattr("prefill_node.fetch_estimate.FIXED_SECONDS", 0.0)

    async def run() -> None:
        async with pair_of() as pair:
            await pair.warm([], [prompt_of(b"first"), prompt_of(b"second")])
            first = await ask(pair, b"first")
            assert first.num_cached_tokens == 0
            await until(lambda: fetched(pair).num_explored == 1)
            second = await ask(pair, b"second")
            assert second.num_cached_tokens == 64
            assert second.token_ids == first.token_ids
            assert fetched(pair).num_waited == 1

    asyncio.run(run())


def test_what_is_here_already_is_not_sent(pair_of: PairOf) -> None:
    async def run() -> None:
        async with pair_of() as pair:
            wanted = await computed(pair, b"first")
            half = make_request(PROMPT[:40], GREEDY, salt=b"second")
            await pair.warm([half], [prompt_of(b"second")])
            before = pair.decode.num_bytes_moved
            answer = await ask(pair, b"second")
            assert answer.token_ids == wanted
            assert answer.num_cached_tokens == 64
            unit = pair.decode.agent.pool.unit_bytes * pair.decode.agent.pool.num_layers
            assert pair.decode.num_bytes_moved - before == 3 * unit, "two fetched, one handed off"

    asyncio.run(run())


def test_a_holder_that_has_lost_it_costs_nothing_but_time(pair_of: PairOf) -> None:
    async def run() -> None:
        async with pair_of() as pair:
            wanted = await computed(pair, b"first")
            answer = await ask(pair, b"second")  # the hint is wrong
            assert answer.token_ids == wanted
            assert answer.num_cached_tokens == 0
            assert fetched(pair).num_failed == 1

    asyncio.run(run())


def test_a_holder_that_never_answers_is_given_up(
    pair_of: PairOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(self: PrefixSender, *arguments: object) -> int:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(PrefixSender, "send", never)
    monkeypatch.setattr(FetchEstimate, "limit_seconds", lambda self, num_tokens: 0.05)

    async def run() -> None:
        async with pair_of() as pair:
            wanted = await computed(pair, b"first")
            await pair.warm([], [prompt_of(b"second")])
            answer = await ask(pair, b"second")
            assert answer.token_ids == wanted
            assert fetched(pair).num_failed == 1

    asyncio.run(run())


def test_a_transfer_that_breaks_off_is_computed(
    pair_of: PairOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = KVSender.commit

    def withdraw(self: KVSender, sequence_id: str, first_token_id: int) -> None:
        if sequence_id.startswith("prefix-"):
            self.abort(sequence_id)
        else:
            commit(self, sequence_id, first_token_id)

    monkeypatch.setattr(KVSender, "commit", withdraw)

    async def run() -> None:
        async with pair_of() as pair:
            wanted = await computed(pair, b"first")
            await pair.warm([], [prompt_of(b"second")])
            answer = await ask(pair, b"second")
            assert answer.token_ids == wanted
            assert answer.num_cached_tokens == 0
            assert fetched(pair).num_failed == 1

    asyncio.run(run())


def test_a_prefix_that_arrives_changed_is_computed(pair_of: PairOf) -> None:
    def spoil(transport: Transport) -> None:
        """Flip a bit of every payload; headers go under the session's own tag."""
        connect = transport.connect

        async def spoiled(host: str, port: int, session_id: int) -> Endpoint:
            endpoint = await connect(host, port, session_id)
            send = endpoint.send

            def flipped(buffer: torch.Tensor, tag: int) -> asyncio.Future[None]:
                message = buffer.clone()
                message[0] ^= tag != session_id
                return send(message, tag)

            endpoint.send = flipped  # type: ignore[method-assign]
            return endpoint

        transport.connect = spoiled  # type: ignore[method-assign]

    async def run() -> None:
        async with pair_of() as pair:
            wanted = await computed(pair, b"first")
            await pair.warm([], [prompt_of(b"second")])
            spoil(pair.decode.agent.transport)
            answer = await ask(pair, b"second")
            assert answer.token_ids == wanted
            assert answer.num_cached_tokens == 0
            assert fetched(pair).num_failed == 1
            assert any("digest" in reason for reason, _ in pair.prefill.agent.stats.failures)

    asyncio.run(run())


def test_a_prompt_that_is_cancelled_while_it_is_fetched_leaves_nothing(
    pair_of: PairOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = asyncio.Event()

    async def never(self: PrefixSender, *arguments: object) -> int:
        reached.set()
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(PrefixSender, "send", never)

    async def run() -> None:
        async with pair_of() as pair:
            request = prompt_of(b"second")
            asking = asyncio.create_task(pair.split([request], num_tokens_held=len(PROMPT)))
            await reached.wait()
            pair.prefill.node.handler.cancel(request.sequence_id)
            await pair.check_nothing_held()
            asking.cancel()
            await asyncio.wait([asking])

    asyncio.run(run())


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_node_that_looks_for_a_prefix_to_give_away_is_not_idle(
    pair_of: PairOf, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hand-off that follows would begin on a node that ends."""
    looking, found = asyncio.Event(), asyncio.Event()

    async def hold(prefix: SequenceRequest, seconds_per_token: float) -> HeldPrefix:
        looking.set()
        await found.wait()
        return HeldPrefix((), lambda: None)

    async def run() -> None:
        async with pair_of() as pair:
            node, asks = pair.prefill, pair.decode
            if role == "decode":
                node, asks = asks, node
            prefixes = node.node.parts.prefixes
            monkeypatch.setattr(prefixes, "_hold", hold)
            handoff = Handoff(
                transfer_id=bytes(16),
                attempt=1,
                decode=asks.node.info.id,
                decode_address=asks.address,
                gateway_id="g",
            )
            asking = asyncio.create_task(prefixes.send(prompt_of(b"first"), handoff, 1.0))
            await looking.wait()
            assert not node.is_idle()
            found.set()
            with pytest.raises(NodeUnavailable):
                await asking
            assert node.is_idle()

    asyncio.run(run())
