"""Rows P5 and D3 of the fault matrix: nodes whose memory is far too small for what is asked."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.faults.asks import Ask, draw_prompt
from tests.faults.cluster_rows import SEED, row_of, running_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.faults.cluster_rows import Rows
    from tests.faults.history import Answer

pytestmark = pytest.mark.faults
BLOCKS = 64  # of 16 tokens: two or three of the prompts below
SMALL = ("--num-gpu-blocks-override", str(BLOCKS), "--max-model-len", "960")
NUM_REQUESTS = 24


@pytest.fixture(scope="module")
def small_rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rows]:
    folder = tmp_path_factory.mktemp("small")
    sizes = ("--prefill", "1", "--decode", "1", "--dtype", "float32")
    options = ("--no-enable-prefix-caching", "--max-num-batched-tokens", "128")
    with running_rows(*options, *SMALL, folder=folder, sizes=sizes) as running:
        yield running


@pytest.fixture
def small(small_rows: Rows, request: pytest.FixtureRequest) -> Iterator[Rows]:
    with row_of(small_rows, request) as row:
        yield row


def many(num_tokens: int) -> list[Ask]:
    draw = random.Random(SEED)
    return [
        Ask(
            number=number,
            prompt=draw_prompt(draw, 200, 400),
            num_tokens=num_tokens,
            deadline_seconds=180.0,
        )
        for number in range(NUM_REQUESTS)
    ]


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_p5_more_prompts_than_fit_wait_for_each_other(small: Rows, policy: str) -> None:
    small.set_policy(policy)
    pids = small.cluster.pids()
    with small.load(many(num_tokens=8)) as history:
        pass
    assert history.codes() <= {"overloaded"}
    assert history.kinds().count("finished") + len(history.erred()) == NUM_REQUESTS
    assert small.cluster.pids() == pids
    small.check_recovered()


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_d3_long_answers_that_do_not_fit_together_all_end(small: Rows, policy: str) -> None:
    """Sequences are preempted and computed again; no two wait for each other for ever."""
    small.set_policy(policy)
    asks = many(num_tokens=300)[:8]
    preempted = small.counted("baton_preemptions_total", ["decode-0"])
    with small.load(asks) as history:
        pass
    alone: dict[int, Answer] = {}
    for ask in asks[:3]:
        alone |= small.undisturbed([ask])
    assert small.counted("baton_preemptions_total", ["decode-0"]) > preempted
    assert history.codes() <= {"overloaded"}
    for number, answer in alone.items():
        assert history.tokens_of(number) == answer.token_ids[: len(history.tokens_of(number))]
    assert not history.erred() or history.codes() == {"overloaded"}
    small.check_recovered()
