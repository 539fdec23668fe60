"""Requests leave a pair of nodes whose link is broken, and come back to it when it is whole."""

from __future__ import annotations

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from cluster.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    NodeLost,
    NodeUnavailable,
    Overloaded,
    ServingError,
    TransferFailed,
)
from cluster.node import NodeState, new_incarnation
from cluster.request import KVLoadFailurePolicy
from gateway.pair_breaker import FAILURES_IN_A_ROW, FIRST_PAUSE_SECONDS
from tests.gateway.running_gateway import ADMIN_TOKEN, RunningGateway
from tests.gateway.test_failures import body, code_of, everything_is_given_back, post
from tests.gateway.test_gateway_metrics import scrape

if TYPE_CHECKING:
    from collections.abc import Callable

    NewGateway = Callable[..., RunningGateway]

BROKEN = "prefill-0 > decode-0"
LINK_LOST = TransferFailed("The data connection broke.", reason="link_lost")


def later(running: RunningGateway, seconds: float) -> None:
    """For the dispatcher, whose sequences have all ended."""
    clock = running.gateway.dispatcher._clock
    running.gateway.dispatcher._clock = lambda: clock() + seconds


def held_back(running: RunningGateway) -> set[str]:
    dispatcher = running.gateway.dispatcher
    pairs = running.do(lambda: dispatcher.pairs.held_back(dispatcher._clock()))
    return {f"{prefill.name} > {decode.name}" for prefill, decode in pairs}


def tried(running: RunningGateway) -> Counter[str]:
    """Hand-offs that were asked for, by pair."""
    return Counter(
        f"{name} > {handoff.decode.name}"
        for name, node in running.nodes.items()
        for handoff in node.handoffs
    )


def admin(running: RunningGateway, path: str) -> Any:
    headers = {"authorization": f"Bearer {ADMIN_TOKEN}"}
    return httpx.get(f"{running.admin.url}/admin/v1/{path}", headers=headers).json()


@pytest.fixture
def running(new_gateway: NewGateway) -> RunningGateway:
    """Two nodes of either role; where all are idle, the broken pair is the first choice."""
    running = new_gateway(num_prefill=2, num_decode=2)
    running.prefill.unreachable.add("decode-0")
    return running


def test_after_three_failures_requests_go_elsewhere_until_a_probe_succeeds(
    running: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(FAILURES_IN_A_ROW + 4):
        assert post(running).status_code == 200
    assert tried(running)[BROKEN] == FAILURES_IN_A_ROW
    assert tried(running)["prefill-0 > decode-1"] == 4, "its nodes work with others"
    assert held_back(running) == {BROKEN}
    assert f"{BROKEN}: held back for 2 s, as hand-offs between them fail (link_lost)" in (
        caplog.messages
    )

    later(running, FIRST_PAUSE_SECONDS)
    for _ in range(3):
        assert post(running).status_code == 200
    assert tried(running)[BROKEN] == FAILURES_IN_A_ROW + 1, "one is tried, and fails"
    assert held_back(running) == {BROKEN}

    running.prefill.unreachable.clear()
    later(running, 2 * FIRST_PAUSE_SECONDS)
    for _ in range(3):
        assert post(running).status_code == 200
    assert tried(running)[BROKEN] == FAILURES_IN_A_ROW + 4
    assert f"{BROKEN}: taken again, a hand-off succeeded" in caplog.messages
    everything_is_given_back(running)


def test_what_the_decode_node_has_to_compute_has_failed_though_no_client_notices(
    new_gateway: NewGateway,
) -> None:
    recompute = KVLoadFailurePolicy.RECOMPUTE
    running = new_gateway(num_prefill=2, num_decode=2, kv_load_failure_policy=recompute)
    running.prefill.unreachable.add("decode-0")
    for _ in range(FAILURES_IN_A_ROW + 2):
        assert post(running).status_code == 200
    assert running.gateway.measures.retries == {}
    assert tried(running)[BROKEN] == FAILURES_IN_A_ROW
    assert running.gateway.measures.pair_holds == {"recomputed": 1}


def test_the_only_pair_is_asked_on_and_on_and_is_free_with_its_first_success(
    new_gateway: NewGateway,
) -> None:
    running = new_gateway()
    running.prefill.unreachable.add("decode-0")
    for _ in range(FAILURES_IN_A_ROW + 2):
        assert code_of(post(running)) == (503, "kv_load_failed")
    assert tried(running)[BROKEN] == FAILURES_IN_A_ROW + 2
    running.prefill.unreachable.clear()
    assert held_back(running) == {BROKEN}
    assert post(running).status_code == 200
    running.until(lambda: not running.gateway.measures.num_pairs_held_back)
    assert not held_back(running)


@pytest.mark.parametrize(
    "error",
    [
        NodeLost("lost", reason="decode_lost"),
        NodeUnavailable("It takes no hand-offs.", reason="decode_not_ready"),
        Overloaded("full"),
        DeadlineExceeded("late"),
        InternalError("a step failed"),
        Cancelled("cancelled"),
    ],
    ids=lambda error: str(error.code),
)
def test_an_ending_that_is_not_the_hand_offs_tells_nothing_of_the_pair(
    new_gateway: NewGateway, error: ServingError
) -> None:
    running = new_gateway()
    running.prefill.error = error
    for _ in range(FAILURES_IN_A_ROW + 1):
        assert post(running).status_code != 200
    assert not held_back(running)


def test_a_sequence_that_fails_after_its_start_tells_nothing_of_the_pair(
    new_gateway: NewGateway,
) -> None:
    running = new_gateway()
    for _ in range(FAILURES_IN_A_ROW + 1):
        running.do(running.decode.gates.tokens.clear)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(post, running)
            running.until(
                lambda: [a for a in running.gateway.dispatcher.active.values() if not is_coming(a)]
            )
            (active,) = running.gateway.dispatcher.active.values()
            running.do(running.gateway.dispatcher.fail, active, LINK_LOST)
            assert code_of(answer.result(20)) == (503, "kv_load_failed")
    assert not held_back(running)


def is_coming(active: Any) -> bool:
    return bool(active.is_on_its_way)


def test_what_is_missed_of_a_node_that_leaves_tells_nothing_of_the_pair(
    new_gateway: NewGateway,
) -> None:
    running = new_gateway()
    running.do(running.prefill.gates.first_token.clear)
    running.prefill.error = LINK_LOST
    with ThreadPoolExecutor(FAILURES_IN_A_ROW) as pool:
        answers = [pool.submit(post, running) for _ in range(FAILURES_IN_A_ROW)]
        running.until(lambda: len(running.prefill.submitted) == FAILURES_IN_A_ROW)
        running.do(running.decode.move_to, NodeState.DRAINING)
        entry = running.gateway.nodes.get("decode-0")
        assert entry is not None
        running.until(lambda: entry.client.departure.is_in_order)
        running.do(running.prefill.gates.first_token.set)
        assert {answer.result(20).status_code for answer in answers} == {503}
    assert not held_back(running)


def test_a_decode_node_that_the_gateway_has_lost_is_no_broken_pair(
    new_gateway: NewGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prefill nodes miss it, too, and may say so later."""
    running = new_gateway()
    entry = running.gateway.nodes.get("decode-0")
    assert entry is not None
    running.do(running.prefill.gates.first_token.clear)
    running.prefill.error = LINK_LOST
    with ThreadPoolExecutor(FAILURES_IN_A_ROW) as pool:
        answers = [pool.submit(post, running) for _ in range(FAILURES_IN_A_ROW)]
        running.until(lambda: len(running.prefill.submitted) == FAILURES_IN_A_ROW)
        monkeypatch.setattr(
            type(entry.client), "is_connected", property(lambda c: c.node.role != entry.info.role)
        )
        running.do(running.prefill.gates.first_token.set)
        assert {answer.result(20).status_code for answer in answers} == {503}
    assert not held_back(running)


def test_another_attempt_keeps_away_from_pairs_that_are_held_back(running: RunningGateway) -> None:
    ids = running.nodes["prefill-1"].info.id, running.nodes["decode-1"].info.id
    breaker = running.gateway.dispatcher.pairs._breaker
    for number in range(FAILURES_IN_A_ROW):
        now = running.gateway.dispatcher._clock()
        running.do(breaker.failed, ids, f"an earlier one, {number}", "link_lost", now)
    assert post(running).status_code == 200
    assert tried(running) == {BROKEN: 1, "prefill-1 > decode-0": 1}


def test_a_probe_whose_client_leaves_gives_its_turn_to_the_next(running: RunningGateway) -> None:
    for _ in range(FAILURES_IN_A_ROW):
        assert post(running).status_code == 200
    running.prefill.unreachable.clear()
    later(running, FIRST_PAUSE_SECONDS)
    running.do(running.prefill.gates.first_token.clear)
    url = f"{running.url}/v1/completions"
    with ThreadPoolExecutor(1) as pool:
        asked = {"x-request-id": "probe"}
        answer = pool.submit(httpx.post, url, json=body(), headers=asked, timeout=20)
        running.until(lambda: tried(running)[BROKEN] == FAILURES_IN_A_ROW + 1)
        assert held_back(running) == {BROKEN}, "until it is known how the probe ends"
        assert running.do(running.gateway.dispatcher.cancel_request, "probe") == 1
        assert answer.result(20).status_code == 499
    assert not held_back(running)
    running.do(running.prefill.gates.first_token.set)
    assert post(running).status_code == 200
    assert tried(running)[BROKEN] == FAILURES_IN_A_ROW + 2
    everything_is_given_back(running)


def test_what_is_known_of_a_node_ends_with_it(running: RunningGateway) -> None:
    for _ in range(FAILURES_IN_A_ROW):
        assert post(running).status_code == 200
    assert running.gateway.measures.num_pairs_held_back == 1
    started_again = replace(running.decode.info.id, incarnation=new_incarnation())
    running.call(running.see(replace(running.decode.info, id=started_again)))
    running.until(lambda: not running.gateway.measures.num_pairs_held_back)
    assert not running.gateway.dispatcher.pairs._breaker._records


def test_operators_see_which_pairs_are_held_back_and_what_was_chosen_instead(
    running: RunningGateway,
) -> None:
    for _ in range(FAILURES_IN_A_ROW):
        assert post(running).status_code == 200
    found = scrape(running)
    assert found["baton_pairs_held_back", ()] == 1
    assert found["baton_pair_holds_total", (("reason", "link_lost"),)] == 1
    nodes = {node["name"]: node["pairs_held_back"] for node in admin(running, "nodes")["nodes"]}
    assert nodes["prefill-1"] == nodes["decode-1"] == []
    (shown,) = nodes["prefill-0"]
    assert (shown["prefill_node"], shown["decode_node"]) == ("prefill-0", "decode-0")
    assert shown["reason"] == "link_lost"
    assert 0 < shown["tried_again_in_seconds"] <= FIRST_PAUSE_SECONDS
    assert nodes["decode-0"][0]["decode_node"] == "decode-0"

    running.do(running.prefill.gates.first_token.clear)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, running)
        running.until(lambda: running.gateway.dispatcher.active)
        (request,) = admin(running, "requests")["requests"]
        running.do(running.prefill.gates.first_token.set)
        assert answer.result(20).status_code == 200
    assert request["decode_node"] == "decode-1"
    assert request["sequences"][0]["instead_of"] == BROKEN
