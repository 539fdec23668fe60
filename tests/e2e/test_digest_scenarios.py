"""What digests, leases and drains must stand, with real engines: load, churn and cancels."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cluster.errors import InternalError
from cluster.proto import node_pb2 as pb
from cluster.request import SamplingParams
from cluster.startup import StartupReport
from engine.config import EngineConfig
from engine.engine import Engine
from kv_transfer.transports.loopback import LoopbackTransport
from tests.checkpoints import POCKET_MODEL, REPOSITORY
from tests.e2e.split_pair import SplitPair, make_request, split_pair
from tests.kv_transfer.catalogue_worlds import StuckTransport
from tests.kv_twins import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from cluster.request import SequenceRequest

GREEDY = SamplingParams(max_tokens=2, seed=0, temperature=0.0, ignore_eos=True)
VOCABULARY = range(10, 2000)


def open_engine(**options: Any) -> Engine:
    settings: dict[str, Any] = {
        "model": REPOSITORY / "baton" / POCKET_MODEL,
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 32,  # chunks of 32 tokens: two blocks, many frames
        "num_threads": 1,
    }
    return Engine.create(
        EngineConfig(**settings | options), progress=StartupReport(sink=lambda _: None)
    )


def run(scenario: Callable[[SplitPair], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        prefill, decode = open_engine(**options), open_engine(max_num_batched_tokens=512)
        async with split_pair(prefill, decode) as pair:
            await scenario(pair)

    asyncio.run(main())


def unique_prompts(count: int, num_tokens: int) -> list[list[int]]:
    numbers = random.Random(0)
    return [[numbers.choice(VOCABULARY) for _ in range(num_tokens)] for _ in range(count)]


def greedy(prompts: Sequence[Sequence[int]], *, salt: bytes = b"") -> list[SequenceRequest]:
    return [make_request(prompt, GREEDY, salt=salt) for prompt in prompts]


def num_failures(pair: SplitPair) -> int:
    nodes = (pair.prefill, pair.decode)
    return sum(node.agent.stats.failures.total() for node in nodes)


def test_240_unique_prompts_at_once_in_chunks_of_32_tokens_raise_no_false_alarm() -> None:
    async def scenario(pair: SplitPair) -> None:
        prompts = unique_prompts(240, 36)
        # In another tenant's cache, so that nothing of it is known when it is handed off.
        undisturbed = await pair.alone(greedy(prompts, salt=b"alone"))
        answers = await pair.split(greedy(prompts))
        assert [a.token_ids for a in answers] == [a.token_ids for a in undisturbed]
        assert num_failures(pair) == 0
        assert not pair.decode.agent.stats.frames_dropped
        assert pair.decode.agent.stats.frames >= 240
        assert all(answer.was_handed_off for answer in answers)

    run(scenario)


@pytest.mark.parametrize("num_blocks", [24])
def test_a_pool_of_24_blocks_under_churn_answers_as_one_node_does(num_blocks: int) -> None:
    """Every block of the prefill node is used again many times while others are sent."""

    async def scenario(pair: SplitPair) -> None:
        prompts = unique_prompts(48, 70)
        undisturbed = await pair.alone(greedy(prompts, salt=b"alone"))
        answers = await pair.split(greedy(prompts))
        assert [a.token_ids for a in answers] == [a.token_ids for a in undisturbed]
        assert num_failures(pair) == 0

    run(scenario, num_gpu_blocks_override=num_blocks, max_model_len=256)


def test_a_first_token_that_ends_the_answer_leaves_the_decode_node_alone() -> None:
    async def scenario(pair: SplitPair) -> None:
        [prompt] = unique_prompts(1, 200)
        [answer] = await pair.split(greedy([prompt], salt=b"before"))
        first = answer.token_ids[0]
        ending = replace(GREEDY, stop_token_ids=(first,), max_tokens=8)
        num_done = pair.decode.agent.stats.transfers_done
        [ended] = await pair.split([make_request(prompt, ending)])
        await pair.check_nothing_held()
        assert ended.token_ids == [first]
        assert ended.by_decode == []
        assert pair.decode.agent.stats.transfers_done == num_done
        assert num_failures(pair) == 0

    run(scenario)


def test_after_200_cancels_of_long_prompts_the_next_answers_are_right_and_nothing_is_held() -> None:
    async def scenario(pair: SplitPair) -> None:
        moments = random.Random(1)
        running: list[SequenceRequest] = []
        for request in greedy(unique_prompts(200, 400)):
            await pair.submit_split(request)
            running.append(request)
            for _ in range(moments.randrange(20)):
                await asyncio.sleep(0)
            while len(running) > moments.randrange(12):
                await cancel(pair, running.pop(moments.randrange(len(running))), moments)
        for request in running:
            await cancel(pair, request, moments)
        prompts = unique_prompts(4, 300)
        answers = await pair.split(greedy(prompts))
        undisturbed = await pair.alone(greedy(prompts, salt=b"alone"))
        assert [a.token_ids for a in answers] == [a.token_ids for a in undisturbed]

    run(scenario, max_num_batched_tokens=64)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_node_that_cannot_have_its_memory_back_ends_itself(role: str) -> None:
    """pegaflow#403, trt#14565: only a new process has it back for sure."""

    async def scenario(pair: SplitPair) -> None:
        node = pair.prefill if role == "prefill" else pair.decode
        node.agent.quarantine.keep(num_blocks=0, num_slots=1, peer="a broken link")
        [fatal] = pair.failures
        assert isinstance(fatal, InternalError)
        pair.failures.clear()

    run(scenario)


def test_a_node_drains_though_some_of_its_blocks_never_come_back() -> None:
    """Nobody waits for them: they are counted in quarantine, and the process has to end."""

    async def scenario(pair: SplitPair) -> None:
        agent = pair.prefill.agent
        assert isinstance(agent.transport, LoopbackTransport)
        agent.transport = link = StuckTransport(agent.transport._network)
        [request] = greedy(unique_prompts(1, 200))
        await pair.submit_split(request)
        await until(lambda: agent.staging.num_free < agent.staging.num_slots)
        await cancel(pair, request, random.Random(0))
        sender = pair.prefill.node.parts.sender
        await until(lambda: sender.num_quarantined_blocks > 0)
        assert not pair.prefill.is_idle(), "sends that may end still read its blocks"
        [peer] = sender._peers.values()
        peer.cut()
        await until(lambda: agent.quarantine.num_kept_blocks > 0)
        await until(pair.prefill.is_idle)
        assert pair.prefill.node.parts.engine.block_manager.num_held_blocks > 0
        pair.failures.clear()  # at a quarter of its slots it ends by itself
        link.let_go()
        await until(lambda: agent.staging.num_free == agent.staging.num_slots)

    run(scenario)


async def cancel(pair: SplitPair, request: SequenceRequest, moments: random.Random) -> None:
    """As a gateway does whose client has left: both nodes hear of it, in some order."""
    frame = pb.GatewayFrame(cancel=pb.Cancel(sequence_id=request.sequence_id))
    for node in moments.sample((pair.prefill, pair.decode), 2):
        await node.session.write(frame)
