"""Tokens through the split pools are those of one node doing both, and of `transformers`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import pytest

from cluster.errors import TransferError
from cluster.request import SamplingParams
from tests.checkpoints import FAMILIES, POCKET_MODEL
from tests.e2e.split_pair import SplitPair, make_request, split_pair

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.request import SequenceRequest
    from tests.checkpoints import Expected, OpenEngine
    from tests.e2e.split_pair import Answer

BLOCK_SIZE = 16
NUM_TOKENS = 24
WHOLE = 1024  # more than the longest prompt
HITS = ("none", "partial", "full")
# What the prefill node and what the decode node has of a prompt.
PLACES = tuple(product(HITS, HITS))
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0)
SAMPLED = SamplingParams(
    max_tokens=NUM_TOKENS,
    seed=0,
    temperature=1.0,
    min_tokens=NUM_TOKENS,
    top_k=60,
    top_p=0.95,
    min_p=0.001,
    repetition_penalty=1.3,
    presence_penalty=0.7,
    frequency_penalty=0.4,
    logit_bias=((7, 2.0), (11, -100.0)),
    num_logprobs=2,
)


@dataclass(frozen=True)
class Case:
    """One prompt, the tokens that must follow, and what each node knows of it beforehand."""

    prompt: list[int]
    tokens: list[int]
    on_prefill: str
    on_decode: str
    salt: bytes  # its own: what is cached of it is what the test put there

    def request(self) -> SequenceRequest:
        return make_request(self.prompt, GREEDY, salt=self.salt)

    def head(self, hits: str) -> list[SequenceRequest]:
        """The prompt that leaves these hits on a node; none for no hits."""
        num_tokens = self._num_known(hits)
        return [make_request(self.prompt[:num_tokens], GREEDY, salt=self.salt)][: num_tokens > 0]

    @property
    def goes_on(self) -> bool:
        """After its first token, so that the decode node is needed."""
        return len(self.tokens) > 1

    @property
    def num_cached_tokens(self) -> int:
        """On the prefill node, which always computes the last token itself."""
        num_blocks = self._num_known(self.on_prefill) // BLOCK_SIZE
        return BLOCK_SIZE * min(num_blocks, (len(self.prompt) - 1) // BLOCK_SIZE)

    @property
    def num_missing_blocks(self) -> int:
        """That the decode node must be sent."""
        num_blocks = -(-len(self.prompt) // BLOCK_SIZE)
        return num_blocks - self._num_known(self.on_decode) // BLOCK_SIZE

    def _num_known(self, hits: str) -> int:
        """Tokens of the prompt; of "partial", half of its whole blocks."""
        half = len(self.prompt) // BLOCK_SIZE // 2 * BLOCK_SIZE
        return {"none": 0, "partial": half, "full": len(self.prompt)}[hits]


def cases_of(reference: list[dict[str, list[int]]], rotation: int, *, label: str) -> list[Case]:
    """Each prompt with another of the nine places; nine rotations are all pairs."""
    cases = []
    for index, each in enumerate(reference):
        on_prefill, on_decode = PLACES[(index + rotation) % len(PLACES)]
        salt = f"{label} {rotation} {index}".encode()
        cases.append(Case(each["prompt"], each["tokens"], on_prefill, on_decode, salt))
    return cases


async def check(pair: SplitPair, cases: Sequence[Case]) -> None:
    """Hand all cases off at once: their tokens, their hits and what was moved for them."""
    await pair.warm(
        [request for case in cases for request in case.head(case.on_prefill)],
        [request for case in cases for request in case.head(case.on_decode)],
    )
    sent, received = pair.prefill.num_bytes_moved, pair.decode.num_bytes_moved
    answers = await pair.split([case.request() for case in cases])
    await pair.check_nothing_held()
    assert token_ids(answers) == [case.tokens for case in cases]
    assert [len(answer.finish_reasons) for answer in answers] == [1] * len(cases)
    assert [a.was_handed_off for a in answers] == [case.goes_on for case in cases]
    assert [a.num_cached_tokens for a in answers] == [case.num_cached_tokens for case in cases]
    layout = pair.decode.node.parts.engine.kv_cache.layout
    block_bytes = layout.num_layers * layout.unit_bytes
    # One that ends with its first token is withdrawn: its blocks may have been on their way.
    most = block_bytes * sum(case.num_missing_blocks for case in cases)
    least = block_bytes * sum(case.num_missing_blocks for case in cases if case.goes_on)
    assert least <= pair.decode.num_bytes_moved - received <= most
    assert least <= pair.prefill.num_bytes_moved - sent <= most


def token_ids(answers: Sequence[Answer]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


def sampled(prompts: Sequence[Sequence[int]], *, salt: bytes) -> list[SequenceRequest]:
    return [
        make_request(prompt, replace(SAMPLED, seed=seed), salt=salt)
        for seed, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize(("chunk", "first"), [(32, 0), (512, 1), (WHOLE, 2)])
@pytest.mark.parametrize("family", [*FAMILIES, POCKET_MODEL])
def test_greedy_tokens_of_the_split_pools_are_those_of_one_node_and_of_the_reference(
    family: str, chunk: int, first: int, expected: Expected, open_engine: OpenEngine
) -> None:
    reference = expected[family]
    assert len(reference) == 16

    async def main() -> None:
        engines = [open_engine(family, max_num_batched_tokens=chunk) for _ in range(2)]
        async with split_pair(*engines) as pair:
            requests = [make_request(each["prompt"], GREEDY) for each in reference]
            alone = await pair.alone(requests)
            assert token_ids(alone) == [each["tokens"] for each in reference]
            # The three chunk sizes share the nine rotations, and so all pairs of hits.
            for rotation in range(first, len(PLACES), 3):
                await check(pair, cases_of(reference, rotation, label="batch"))
            for case in cases_of(reference, 4 * first, label="single")[: len(PLACES)]:
                await check(pair, [case])

    asyncio.run(main())


@pytest.mark.parametrize("group_bytes", [1, 40_000])
@pytest.mark.parametrize("chunk", [40, WHOLE])
@pytest.mark.parametrize("family", ["llama3", "qwen3", POCKET_MODEL])
def test_layers_sent_while_later_ones_are_computed_give_the_same_tokens(
    family: str,
    chunk: int,
    group_bytes: int,
    expected: Expected,
    open_engine: OpenEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = expected[family]
    monkeypatch.setattr("prefill_node.node.CPU_GROUP_BYTES", group_bytes)

    async def main() -> None:
        engines = [open_engine(family, max_num_batched_tokens=chunk) for _ in range(2)]
        async with split_pair(*engines) as pair:
            await pair.split([make_request(reference[3]["prompt"], GREEDY, salt=b"streamed")])
            num_layers = engines[0].model_config.num_layers
            if group_bytes == 1 and chunk == WHOLE:
                assert pair.prefill.agent.stats.frames == num_layers
            for rotation in (0, 4, 7):
                await check(pair, cases_of(reference, rotation, label="streamed"))

    asyncio.run(main())


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3", POCKET_MODEL])
def test_prompts_that_share_their_beginnings_find_them_on_both_nodes(
    family: str, expected: Expected, open_engine: OpenEngine
) -> None:
    reference = expected[family]

    async def main() -> None:
        engines = [open_engine(family, max_num_batched_tokens=40) for _ in range(2)]
        async with split_pair(*engines) as pair:
            hits = []
            for _ in range(2):
                requests = [make_request(each["prompt"], GREEDY) for each in reference]
                answers = await pair.split(requests)
                assert token_ids(answers) == [each["tokens"] for each in reference]
                await pair.check_nothing_held()
                hits.append([answer.num_cached_tokens for answer in answers])
            full = [(len(e["prompt"]) - 1) // BLOCK_SIZE * BLOCK_SIZE for e in reference]
            assert hits[0] != full
            assert hits[1] == full

    asyncio.run(main())


@pytest.mark.parametrize("family", ["llama3", "qwen2", POCKET_MODEL])
def test_tokens_from_kv_in_8_bit_floats_are_those_of_one_node(
    family: str, expected: Expected, open_engine: OpenEngine
) -> None:
    prompts = [each["prompt"] for each in expected[family]]

    async def main() -> None:
        engines = [
            open_engine(family, max_num_batched_tokens=64, kv_cache_dtype="fp8") for _ in range(2)
        ]
        async with split_pair(*engines) as pair:
            alone, split, again = [], [], []
            for prompt in prompts:  # alone in their batches, so that every step is the same
                alone += await pair.alone([make_request(prompt, GREEDY, salt=b"alone")])
                split += await pair.split([make_request(prompt, GREEDY, salt=b"split")])
                again += await pair.split([make_request(prompt, GREEDY, salt=b"split")])
            assert token_ids(split) == token_ids(alone)
            assert token_ids(again) == token_ids(alone)  # from cached blocks, on both nodes
            assert sum(answer.was_handed_off for answer in split) >= len(prompts) - 1
            assert sum(answer.num_cached_tokens for answer in again) > 0
            assert token_ids(alone) != [each["tokens"] for each in expected[family]]

    asyncio.run(main())


@pytest.mark.parametrize("is_prefills", [True, False])
def test_kv_in_8_bit_floats_is_not_paired_with_other_kv(
    is_prefills: bool, expected: Expected, open_engine: OpenEngine
) -> None:
    prompt = expected["llama3"][3]["prompt"]
    engines = [open_engine("llama3", kv_cache_dtype="fp8"), open_engine("llama3")]

    async def main() -> None:
        async with split_pair(*(engines if is_prefills else reversed(engines))) as pair:
            with pytest.raises(TransferError, match="nodes differ in model, KV layout"):
                await pair.split([make_request(prompt, GREEDY)])
            (alone,) = await pair.alone([make_request(prompt, GREEDY)])
            assert len(alone.token_ids) == NUM_TOKENS

    asyncio.run(main())


@pytest.mark.parametrize("family", ["llama3", "qwen2", POCKET_MODEL])
def test_seeded_tokens_under_every_penalty_are_those_of_one_node(
    family: str, expected: Expected, open_engine: OpenEngine
) -> None:
    prompts = [each["prompt"] for each in expected[family]]

    async def main() -> None:
        engines = [open_engine(family, max_num_batched_tokens=64) for _ in range(2)]
        async with split_pair(*engines) as pair:
            alone = await pair.alone(sampled(prompts, salt=b"alone"))
            split = await pair.split(sampled(prompts, salt=b"split"))
            assert token_ids(split) == token_ids(alone)
            assert all(answer.was_handed_off for answer in split)
            for one, other in zip(split, alone, strict=True):
                assert len(one.logprobs) == NUM_TOKENS
                assert [entry.logprob for entry in one.logprobs] == pytest.approx(
                    [entry.logprob for entry in other.logprobs], abs=1e-4
                )
            greedy = [each["tokens"] for each in expected[family]]
            assert token_ids(split) != greedy  # drawn, not chosen

    asyncio.run(main())


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3_untied"])
def test_a_sequence_that_the_decode_node_preempts_goes_on_with_the_same_tokens(
    family: str, expected: Expected, open_engine: OpenEngine
) -> None:
    # With its output the longest fills all blocks but one, so they cannot all run at once.
    reference = [each for each in expected[family] if len(each["prompt"]) <= 77]
    prompts = [each["prompt"] for each in reference]

    async def main() -> None:
        async with split_pair(open_engine(family), open_engine(family)) as pair:
            undisturbed = await pair.alone(sampled(prompts, salt=b""))
        tiny = open_engine(family, num_gpu_blocks_override=8, max_model_len=128)
        async with split_pair(open_engine(family), tiny) as pair:
            answers = await pair.split([make_request(prompt, GREEDY) for prompt in prompts])
            assert token_ids(answers) == [each["tokens"] for each in reference]
            assert all(answer.was_handed_off for answer in answers)
            num_preemptions = pair.decode.node.parts.loop.stats.num_preemptions
            assert num_preemptions > 0
            await pair.check_nothing_held()
            drawn = await pair.split(sampled(prompts, salt=b""))
            assert token_ids(drawn) == token_ids(undisturbed)
            assert pair.decode.node.parts.loop.stats.num_preemptions > num_preemptions

    asyncio.run(main())
