"""What nodes and transfers failed is tried again on other nodes, and the client cannot tell."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from cluster.errors import (
    DeadlineExceeded,
    InternalError,
    NodeLost,
    ServingError,
    TransferFailed,
)
from cluster.node import NodeId, NodeInfo, NodeName, NodeRole, NodeState, new_incarnation
from cluster.request import SamplingParams, SequenceRequest, TokenDelta
from gateway.pair_breaker import FAILURES_IN_A_ROW
from gateway.retries import (
    MAX_RECOVERIES,
    MAX_SAVED_RETRIES,
    RetryBudget,
    RetryKind,
    Stream,
    who_failed,
)
from gateway.router import Candidate, Demand, Placement, choose_again
from tests.gateway.running_gateway import RunningGateway
from tests.gateway.test_failures import OpenStream, body, code_of, everything_is_given_back, post
from tests.gateway.test_gateway_metrics import scrape

NewGateway = Callable[..., RunningGateway]
LOST = NodeLost("lost", reason="prefill_lost")


def node(name: str, role: NodeRole) -> NodeInfo:
    return NodeInfo(
        id=NodeId(NodeName(name), new_incarnation()),
        role=role,
        state=NodeState.READY,
        grpc_address=f"{name}:1",
        metrics_address="",
        model_name="m",
        compatibility_hash="h",
        block_size=16,
        max_model_len=512,
        transports=("tcp",),
    )


PREFILL, OTHER_PREFILL = node("p0", NodeRole.PREFILL), node("p1", NodeRole.PREFILL)
DECODE, OTHER_DECODE = node("d0", NodeRole.DECODE), node("d1", NodeRole.DECODE)
PAIR = Placement(prefill=PREFILL, decode=DECODE)


def stream(*, recovers: bool = False, deadline: float | None = None) -> Stream:
    request = SequenceRequest(
        sequence_id="s",
        request_id="r",
        prompt_token_ids=(5, 6, 7),
        sampling=SamplingParams(max_tokens=9, seed=3),
        deadline_seconds=None if deadline is None else deadline,
    )
    return Stream(request, deadline=deadline, recovers=recovers)


def tokens(*ids: int) -> TokenDelta:
    return TokenDelta(sequence_id="s", token_ids=ids)


# ---- the rules ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [DeadlineExceeded("late"), InternalError("step failed"), ServingError("?")],
)
def test_an_error_that_would_come_again_is_not_retried(error: ServingError) -> None:
    assert stream(recovers=True).retry_kind(error, RetryBudget()) is None


def test_a_stream_is_redispatched_once() -> None:
    one, budget = stream(), RetryBudget()
    assert one.retry_kind(LOST, budget) is RetryKind.REDISPATCH
    one.next_attempt(RetryKind.REDISPATCH, PREFILL.id, PAIR, now=0.0)
    assert one.retry_kind(LOST, budget) is None


def test_an_empty_budget_ends_redispatches_until_a_tenth_of_the_requests_fills_it() -> None:
    budget = RetryBudget()
    while budget.withdraw():
        pass
    assert stream().retry_kind(LOST, budget) is None
    for _ in range(10):
        assert not budget.withdraw()
        budget.deposit()
    budget.deposit()
    assert budget.withdraw()


def test_a_redispatch_that_finds_no_other_node_costs_nothing(new_gateway: NewGateway) -> None:
    running = new_gateway()
    running.prefill.error = TransferFailed("The KV did not arrive.", reason="digest_mismatch")
    for _ in range(int(MAX_SAVED_RETRIES) + 2):
        assert code_of(post(running)) == (503, "kv_load_failed")
    budget = running.gateway.dispatcher._budget
    assert sum(budget.withdraw() for _ in range(100)) == MAX_SAVED_RETRIES


def test_saved_retries_are_bounded() -> None:
    budget = RetryBudget()
    for _ in range(1000):
        budget.deposit()
    assert sum(budget.withdraw() for _ in range(100)) == MAX_SAVED_RETRIES


def test_a_stream_with_tokens_goes_on_only_where_the_operator_allows_it() -> None:
    for recovers, expected in ((False, None), (True, RetryKind.RECOVERY)):
        one = stream(recovers=recovers)
        one.deliver(tokens(1))
        assert one.retry_kind(LOST, RetryBudget()) is expected


def test_a_stream_does_not_recover_for_ever() -> None:
    one, budget = stream(recovers=True), RetryBudget()
    one.deliver(tokens(1))
    for _ in range(MAX_RECOVERIES):
        kind = one.retry_kind(LOST, budget)
        assert kind is RetryKind.RECOVERY
        one.next_attempt(kind, PREFILL.id, PAIR, now=0.0)
    assert one.retry_kind(LOST, budget) is None


def test_the_next_attempt_has_an_id_of_its_own_what_was_emitted_and_the_time_that_is_left() -> None:
    one = stream(recovers=True, deadline=30.0)
    one.deliver(tokens(1, 2))
    again = one.next_attempt(RetryKind.RECOVERY, PREFILL.id, PAIR, now=20.0)
    assert again.sequence_id != one.id
    assert again.prompt_token_ids == (5, 6, 7, 1, 2)
    assert again.num_emitted_tokens == 2
    assert again.deadline_seconds == pytest.approx(10.0)
    assert again.sampling == one.request.sampling
    third = one.next_attempt(RetryKind.RECOVERY, PREFILL.id, PAIR, now=20.0)
    assert third.sequence_id not in (one.id, again.sequence_id)


@pytest.mark.parametrize(
    ("reason", "suspect"),
    [
        *(("prefill_lost", PREFILL), ("digest_mismatch", PREFILL), ("decode_lost", DECODE)),
        *(("not_ready", PREFILL), ("decode_not_ready", DECODE), ("recompute_differs", DECODE)),
    ],
)
def test_the_node_that_failed_is_the_suspect(reason: str, suspect: NodeInfo) -> None:
    one = stream()
    failed = who_failed(NodeLost("x", reason=reason), PAIR, leaving=set())
    one.next_attempt(RetryKind.REDISPATCH, failed, PAIR, now=0.0)
    assert one.suspects == {suspect.id}
    assert one.avoided == {PREFILL.id, DECODE.id}


def placed(
    *names: NodeInfo,
    suspects: set[NodeId],
    avoided: set[NodeId],
    parted: AbstractSet[NodeId] = frozenset(),
) -> Placement:
    candidates = [
        Candidate(node=n, is_connected=True, queued_tokens=0, num_sequences=0, reserved_tokens=0)
        for n in names
    ]
    demand = Demand(num_prompt_tokens=8, num_tokens=16)
    return choose_again(candidates, demand, suspects=suspects, avoided=avoided, parted=parted)


def test_a_partner_is_taken_again_only_if_there_is_no_other() -> None:
    suspects, avoided = {PREFILL.id}, {PREFILL.id, DECODE.id}
    both = placed(PREFILL, OTHER_PREFILL, DECODE, OTHER_DECODE, suspects=suspects, avoided=avoided)
    assert (both.prefill, both.decode) == (OTHER_PREFILL, OTHER_DECODE)
    lone = placed(PREFILL, OTHER_PREFILL, DECODE, suspects=suspects, avoided=avoided)
    assert (lone.prefill, lone.decode) == (OTHER_PREFILL, DECODE)
    with pytest.raises(ServingError):
        placed(PREFILL, DECODE, suspects=suspects, avoided=avoided)


def test_a_node_whose_hand_off_failed_works_with_another_partner_last_of_all() -> None:
    both = {PREFILL.id, DECODE.id}
    failed = {"suspects": {PREFILL.id}, "avoided": both, "parted": {PREFILL.id}}
    lone = placed(PREFILL, DECODE, OTHER_DECODE, **failed)
    assert (lone.prefill, lone.decode) == (PREFILL, OTHER_DECODE)
    other = placed(PREFILL, OTHER_PREFILL, DECODE, **failed)
    assert (other.prefill, other.decode) == (OTHER_PREFILL, DECODE)
    with pytest.raises(ServingError):
        placed(PREFILL, DECODE, **failed)
    failed |= {"suspects": {DECODE.id}, "parted": {DECODE.id}}
    only = placed(PREFILL, OTHER_PREFILL, DECODE, **failed)
    assert (only.prefill, only.decode) == (OTHER_PREFILL, DECODE)


def test_a_prefill_node_that_failed_otherwise_too_is_not_taken_again() -> None:
    one = stream(recovers=True)
    one.next_attempt(RetryKind.REDISPATCH, PREFILL.id, PAIR, now=0.0, is_handoff=True)
    assert one.parted == {PREFILL.id}
    one.next_attempt(RetryKind.RECOVERY, PREFILL.id, PAIR, now=0.0)
    assert not one.parted


# ---- through HTTP -------------------------------------------------------------------------


def text_of(events: list[str]) -> str:
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert not any("error" in chunk for chunk in chunks)
    return "".join(c["choices"][0]["text"] for c in chunks if c["choices"])


@pytest.fixture
def expected(new_gateway: NewGateway) -> str:
    """What an undisturbed run answers to `body()`."""
    return str(post(new_gateway()).json()["choices"][0]["text"])


def working_prefill(running: RunningGateway) -> Any:
    nodes = [n for n in running.nodes.values() if n.info.role is NodeRole.PREFILL]
    return next((n for n in nodes if n.submitted), None)


def working_decode(running: RunningGateway) -> Any:
    nodes = [n for n in running.nodes.values() if n.info.role is NodeRole.DECODE]
    return next((n for n in nodes if not n.is_idle), None)


def test_a_prefill_node_killed_before_its_token_costs_only_time(
    new_gateway: NewGateway, expected: str
) -> None:
    running = new_gateway(num_prefill=2)
    for name in ("prefill-0", "prefill-1"):
        running.do(running.nodes[name].gates.first_token.clear)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, running)
        running.until(lambda: working_prefill(running))
        victim = working_prefill(running)
        for name in ("prefill-0", "prefill-1"):
            if running.nodes[name] is not victim:
                running.do(running.nodes[name].gates.first_token.set)
        running.call(victim.kill())
        response = answer.result(20)
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"] == expected
    assert running.gateway.measures.retries["redispatch", "prefill_lost"] == 1
    assert scrape(running)["baton_retries_left", ()] == MAX_SAVED_RETRIES - 1
    everything_is_given_back(running)


def test_a_failed_transfer_is_redispatched_to_another_prefill_node_and_then_reported(
    new_gateway: NewGateway,
) -> None:
    running = new_gateway(num_prefill=3)
    for number in range(3):
        error = TransferFailed("The KV did not arrive.", reason="digest_mismatch")
        running.nodes[f"prefill-{number}"].error = error
    assert code_of(post(running)) == (503, "kv_load_failed")
    tried = [n for n in running.nodes.values() if n.submitted]
    assert len(tried) == 2
    everything_is_given_back(running)


def test_a_decode_node_that_one_prefill_node_cannot_reach_works_with_another(
    new_gateway: NewGateway, expected: str
) -> None:
    running = new_gateway(num_prefill=2)
    running.prefill.error = TransferFailed("It does not answer.", reason="decode_lost")
    assert post(running).json()["choices"][0]["text"] == expected
    assert running.gateway.measures.retries == {("redispatch", "decode_lost"): 1}


@pytest.mark.parametrize(("num_prefill", "num_decode"), [(1, 3), (3, 1)])
def test_a_client_hears_nothing_of_one_broken_link_however_few_nodes_there_are_of_a_role(
    new_gateway: NewGateway, expected: str, num_prefill: int, num_decode: int
) -> None:
    running = new_gateway(num_prefill=num_prefill, num_decode=num_decode)
    running.prefill.unreachable.add("decode-0")
    for _ in range(FAILURES_IN_A_ROW + 1):
        assert post(running).json()["choices"][0]["text"] == expected
    assert running.gateway.measures.retries == {("redispatch", "link_lost"): FAILURES_IN_A_ROW}
    everything_is_given_back(running)


def test_a_stream_whose_recomputed_part_does_not_fit_goes_on_elsewhere(
    new_gateway: NewGateway, expected: str
) -> None:
    running = new_gateway(num_decode=2, stream_recovery=True)
    running.do(running.prefill.gates.hand_off.clear)
    reading = OpenStream(running)
    assert reading.has_text.wait(10)
    (active,) = running.do(lambda: list(running.gateway.dispatcher.active.values()))
    first = running.nodes[active.decode.info.id.name]

    def recompute_otherwise() -> None:
        for delta in (
            {"started": True, "recomputed": True},
            {"token_ids": (active.request.prompt_token_ids[0] + 1,)},
        ):
            said = TokenDelta(sequence_id=active.request.sequence_id, **delta)
            first.hub.publish(running.gateway.dispatcher.gateway_id, [said])
        running.prefill.gates.hand_off.set()

    running.do(recompute_otherwise)
    assert text_of(reading.result()) == expected
    assert running.gateway.measures.retries["recovery", "recompute_differs"] == 1
    everything_is_given_back(running)


def test_a_stream_survives_the_loss_of_its_decode_node(
    new_gateway: NewGateway, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    running = new_gateway(num_decode=2, stream_recovery=True)
    for name in ("decode-0", "decode-1"):
        running.do(running.nodes[name].gates.tokens.clear)
    reading = OpenStream(running)
    assert reading.has_text.wait(10)
    running.until(lambda: working_decode(running))
    victim = working_decode(running)
    for name in ("decode-0", "decode-1"):
        if running.nodes[name] is not victim:
            running.do(running.nodes[name].gates.tokens.set)
    running.call(victim.kill())
    assert text_of(reading.result()) == expected
    assert running.gateway.measures.retries["recovery", "decode_lost"] == 1
    everything_is_given_back(running)
    running.until(lambda: "request ended" in caplog.messages)
    assert "an attempt failed: recovery" in caplog.messages
    (ended,) = [r.__dict__ for r in caplog.records if r.message == "request ended"]
    assert (ended["status"], ended["num_retries"]) == (200, 1)
    assert len(ended["nodes"].split(", ")) == 2


def test_a_stream_that_cannot_go_on_elsewhere_gets_the_error(new_gateway: NewGateway) -> None:
    running = new_gateway(stream_recovery=True)
    running.do(running.decode.gates.tokens.clear)
    reading = OpenStream(running)
    assert reading.has_text.wait(10)
    running.until(lambda: not running.prefill._tasks)
    running.call(running.decode.kill())
    assert reading.error() == "node_lost"
    everything_is_given_back(running)


def test_a_client_that_leaves_after_a_recovery_ends_the_attempt_that_runs(
    new_gateway: NewGateway,
) -> None:
    running = new_gateway(num_decode=2, stream_recovery=True)
    for name in ("decode-0", "decode-1"):
        running.do(running.nodes[name].gates.tokens.clear)
    url = f"{running.url}/v1/completions"
    with httpx.stream("POST", url, json=body(stream=True), timeout=20) as response:
        lines = response.iter_lines()
        next(lines)
        running.until(lambda: working_decode(running))
        victim = working_decode(running)
        survivor = next(
            n for n in running.nodes.values() if n.info.role is NodeRole.DECODE and n is not victim
        )
        running.call(victim.kill())
        running.until(lambda: not survivor.is_idle)
    running.until(lambda: survivor.is_idle)
    assert survivor.cancelled == [f"{next(iter(victim.submitted))}.2"]
    everything_is_given_back(running)


def test_the_policy_decides_at_the_start_of_a_request(new_gateway: NewGateway) -> None:
    running = new_gateway(num_decode=2, stream_recovery=True)
    for name in ("decode-0", "decode-1"):
        running.do(running.nodes[name].gates.tokens.clear)
    running.do(lambda: running.gateway.policy.change(stream_recovery=False))
    reading = OpenStream(running)
    assert reading.has_text.wait(10)
    running.do(lambda: running.gateway.policy.change(stream_recovery=True))
    running.until(lambda: working_decode(running))
    running.call(working_decode(running).kill())
    assert reading.error() == "node_lost"


def test_each_attempt_has_a_transfer_of_its_own(new_gateway: NewGateway) -> None:
    """vllm-ascend#13929: a retry went out with the parameters of the attempt that had failed."""
    running = new_gateway(num_prefill=3)
    for number in range(3):
        error = TransferFailed("The KV did not arrive.", reason="digest_mismatch")
        running.nodes[f"prefill-{number}"].error = error
    assert code_of(post(running)) == (503, "kv_load_failed")
    handoffs = [handoff for node in running.nodes.values() for handoff in node.handoffs]
    assert len({handoff.transfer_id for handoff in handoffs}) == 2
    assert sorted(handoff.attempt for handoff in handoffs) == [1, 2]
    everything_is_given_back(running)
