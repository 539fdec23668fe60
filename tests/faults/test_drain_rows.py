"""Row O1 of the fault matrix: a node is told to end under load. It takes nothing new, lets what it
has run to its end, and leaves: no client may notice. One that is killed meanwhile had said that it
leaves: what waited there costs no retry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.asks import draw_asks
from tests.faults.cluster_rows import NUM_TOKENS, SEED
from tests.faults.nemesis import verify

if TYPE_CHECKING:
    from tests.faults.cluster_rows import Rows

pytestmark = pytest.mark.faults
NUM_STREAMS = 48  # most of which wait for their prefill node when the other one leaves


@pytest.mark.parametrize("is_idle", [True, False], ids=["idle", "busy"])
@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_o1_a_node_that_leaves_in_order_costs_no_answer(
    rows: Rows, name: str, is_idle: bool
) -> None:
    """An idle decode node does not know of the prompts that wait for it elsewhere."""
    asks = draw_asks(SEED, NUM_STREAMS, prompt=(200, 400), num_tokens=NUM_TOKENS)
    oracle = rows.undisturbed(asks)
    with rows.load(asks) as history:
        if is_idle:
            verify(lambda: history.kinds().count("sent") == NUM_STREAMS, "not all were sent")
        else:
            history.wait_for_tokens(1)
        rows.nemesis.end(name)
    rows.check(history, oracle)
    assert history.codes() == set()
    rows.check_recovered()


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_o1_a_node_that_is_killed_in_its_drain_costs_no_request_without_a_token(
    rows: Rows, name: str
) -> None:
    """More of them wait there than a retry budget would try again."""
    asks = draw_asks(SEED, NUM_STREAMS, prompt=(200, 400), num_tokens=NUM_TOKENS)
    oracle = rows.undisturbed(asks)
    with rows.load(asks) as history:
        history.wait_for_tokens(1)
        rows.nemesis.kill_in_drain(name, lambda: _is_draining(rows, name))
    rows.check(history, oracle)
    assert all(history.tokens_of(number) for number in history.erred())
    rows.check_recovered()


def _is_draining(rows: Rows, name: str) -> bool:
    return bool(rows.cluster.nodes()[name]["state"] == "draining")
