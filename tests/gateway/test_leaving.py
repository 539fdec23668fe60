"""A node that begins to drain says so on its session: from then on what is missed of it is missed
in order, whoever reports it, whether it gets to its end or not, whatever the registry says."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import httpx
import pytest

from cluster.errors import InvalidRequest, NodeLost
from cluster.node import NodeRole, NodeState
from cluster.proto import node_pb2 as pb
from cluster.request import TokenDelta
from gateway.departure import Presence
from tests.gateway.fake_node import FakeNode
from tests.gateway.running_gateway import ADMIN_TOKEN, RunningGateway
from tests.gateway.test_failures import code_of, everything_is_given_back, post

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.node_client import NodeClient

NewGateway = Callable[..., RunningGateway]
MANY = 32  # far more than a budget allows to try again


def client_of(running: RunningGateway, node: FakeNode) -> NodeClient:
    [client] = [e.client for e in running.gateway.nodes if e.info.id == node.info.id]
    return client


def state_of(running: RunningGateway, name: str) -> NodeState:
    entry = running.gateway.nodes.get(name)
    assert entry is not None
    return entry.info.state


def prefill_nodes(running: RunningGateway) -> list[FakeNode]:
    return [node for node in running.nodes.values() if node.info.role is NodeRole.PREFILL]


@pytest.fixture
def expected(new_gateway: NewGateway) -> str:
    """What an undisturbed run answers to `body()`."""
    return str(post(new_gateway()).json()["choices"][0]["text"])


@contextmanager
def waiting(running: RunningGateway) -> Iterator[list[Future[httpx.Response]]]:
    """Requests of which none has a token yet during the block."""
    nodes = prefill_nodes(running)
    for node in nodes:
        running.do(node.gates.first_token.clear)
    with ThreadPoolExecutor(MANY) as pool:
        answers = [pool.submit(post, running) for _ in range(MANY)]
        running.until(lambda: sum(len(node.submitted) for node in nodes) == MANY)
        try:
            yield answers
        finally:
            for node in nodes:
                running.do(node.gates.first_token.set)


def all_are_served(running: RunningGateway, answers: list[Any], expected: str) -> None:
    responses = [answer.result(20) for answer in answers]
    assert {response.status_code for response in responses} == {200}
    assert {response.json()["choices"][0]["text"] for response in responses} == {expected}
    assert not [kind for kind, _ in running.gateway.measures.retries if kind != "in_order"]
    everything_is_given_back(running)


def drain(running: RunningGateway, node: FakeNode) -> None:
    """It says so, and the gateway knows."""
    client = client_of(running, node)
    running.do(node.move_to, NodeState.DRAINING)
    running.until(lambda: client.departure.presence is Presence.LEAVING)


@pytest.mark.parametrize("leaves", [True, False])
def test_of_those_that_say_nothing_only_who_ends_its_streams_leaves_in_order(
    new_gateway: NewGateway, leaves: bool
) -> None:
    """As an older node does, and one that is killed."""
    running = new_gateway()
    client = client_of(running, running.decode)
    running.call(running.decode.leave() if leaves else running.decode.kill())
    running.until(lambda: not client.is_connected)
    assert client.departure.presence is (Presence.LEFT if leaves else Presence.STAYS)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("goes_by", ["leave", "kill"])
def test_whoever_waits_for_a_node_that_has_said_that_it_goes_is_served_elsewhere(
    new_gateway: NewGateway, expected: str, role: str, goes_by: str
) -> None:
    """In order or not: one that is killed in its drain had said so."""
    running = new_gateway(num_prefill=2, num_decode=2)
    with waiting(running) as answers:
        leaver = running.nodes[f"{role}-0"]
        drain(running, leaver)
        running.call(getattr(leaver, goes_by)())
        running.until(lambda: len(prefill_nodes(running)[1].submitted) >= MANY // 2)
    all_are_served(running, answers, expected)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_whoever_waits_for_a_node_that_ends_in_order_is_served_elsewhere(
    new_gateway: NewGateway, expected: str, role: str
) -> None:
    """Prompts that queue for a decode node are not known there: it may be idle, and go. An older
    one says nothing before."""
    running = new_gateway(num_prefill=2, num_decode=2)
    with waiting(running) as answers:
        running.call(running.nodes[f"{role}-0"].leave())
        running.until(lambda: len(prefill_nodes(running)[1].submitted) >= MANY // 2)
    all_are_served(running, answers, expected)


def test_a_loss_that_a_peer_reports_first_is_in_order_once_the_node_has_said_that_it_goes(
    new_gateway: NewGateway, expected: str
) -> None:
    """Prefill nodes miss a decode node before its session here has ended."""
    running = new_gateway(num_prefill=1, num_decode=2)
    with waiting(running) as answers:
        leaver = running.nodes["decode-0"]
        drain(running, leaver)
        ids = {h.decode: [] for h in running.prefill.handoffs}  # type: ignore[var-annotated]
        for handoff, name in zip(running.prefill.handoffs, running.prefill.submitted, strict=True):
            ids[handoff.decode].append(name)
        lost = NodeLost("The decode node was lost.", reason="decode_lost")
        missed = ids[leaver.info.id]
        assert len(missed) > 10, "more than a budget allows"
        for name in missed:
            running.do(running.prefill._tasks[name].cancel)
            running.do(_say, running.prefill, TokenDelta(sequence_id=name, error=lost))
        running.until(lambda: len(running.prefill.submitted) == MANY + len(missed))
        assert client_of(running, leaver).is_connected
    all_are_served(running, answers, expected)


def _say(node: FakeNode, delta: TokenDelta) -> None:
    for gateway_id in list(node.hub._sessions):
        node.hub.publish(gateway_id, [delta])


def test_a_decode_node_that_drains_has_its_answer_when_what_waits_for_it_elsewhere_has_come(
    new_gateway: NewGateway, expected: str
) -> None:
    """It is idle, and would go: a prompt of which the client has a token could not be moved."""
    running = new_gateway(num_prefill=1, num_decode=2)
    leaver = running.nodes["decode-0"]
    with waiting(running) as answers:
        drain(running, leaver)
        placed = sum(h.decode == leaver.info.id for h in running.prefill.handoffs)
        assert placed > 0
        assert leaver.is_idle
        assert not leaver.hub.is_answered
    all_are_served(running, answers, expected)
    running.until(lambda: leaver.hub.is_answered)
    assert len(leaver.submitted) == placed
    assert not running.gateway.measures.retries, "nothing had to be moved"


def drained_on(running: RunningGateway, name: str) -> list[str]:
    """The gateways that it waits for, as an operator sees; `this`: the one that is asked."""
    headers = {"authorization": f"Bearer {ADMIN_TOKEN}"}
    shown = httpx.get(f"{running.admin.url}/admin/v1/nodes", headers=headers).json()
    [node] = [node for node in shown["nodes"] if node["name"] == name]
    return ["this" if each == shown["gateway"] else each for each in node["awaited_gateways"]]


def test_an_operator_sees_which_gateways_a_draining_node_waits_for(
    new_gateway: NewGateway,
) -> None:
    """Nothing bounds it: a gateway that never settles must not be a riddle."""
    running = new_gateway()
    with waiting(running) as answers:
        assert drained_on(running, "decode-0") == [], "it takes work: that it is used is no news"
        drain(running, running.decode)
        assert drained_on(running, "decode-0") == ["this"]
    assert {answer.result(20).status_code for answer in answers} == {200}
    running.until(lambda: running.decode.hub.is_answered)
    assert drained_on(running, "decode-0") == []


class Unseen(dict[str, Any]):
    def values(self) -> Any:
        raise AssertionError("all of them were looked at")


def test_what_is_on_its_way_is_known_without_a_look_at_every_sequence(
    new_gateway: NewGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a node that leaves it is asked at every frame, and at the end of each sequence."""
    running = new_gateway()
    with waiting(running) as answers:
        drain(running, running.decode)
        attempts, client = running.gateway.dispatcher._attempts, client_of(running, running.decode)

        def settle() -> None:
            with monkeypatch.context() as patch:
                patch.setattr(attempts, "active", Unseen(attempts.active))
                client.settle()

        running.do(settle)
        assert not running.decode.hub.is_answered
    assert {answer.result(20).status_code for answer in answers} == {200}
    running.until(lambda: running.decode.hub.is_answered)
    assert not attempts._on_their_way


def test_what_has_started_is_not_on_its_way_any_more(new_gateway: NewGateway) -> None:
    """Streams run there, and will for long: that is for the node to know."""
    running = new_gateway()
    running.do(running.decode.gates.tokens.clear)
    with waiting(running) as answers:
        drain(running, running.decode)
        running.do(running.prefill.gates.first_token.set)
        running.until(lambda: running.decode.hub.is_answered)
        assert len(running.decode.submitted) == MANY
        assert not running.decode.is_idle
        running.do(running.decode.gates.tokens.set)
        assert {answer.result(20).status_code for answer in answers} == {200}


def test_what_ends_before_it_comes_is_not_on_its_way_any_more(new_gateway: NewGateway) -> None:
    running = new_gateway()
    running.do(running.prefill.gates.first_token.clear)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, running, max_tokens=1)
        running.until(lambda: running.prefill.submitted)
        drain(running, running.decode)
        assert not running.decode.hub.is_answered
        running.do(running.prefill.gates.first_token.set)
        assert answer.result(20).status_code == 200
    running.until(lambda: running.decode.hub.is_answered)
    assert not running.decode.submitted


def test_what_was_asked_on_one_session_is_not_answered_on_the_next(
    new_gateway: NewGateway,
) -> None:
    running = new_gateway()
    client = client_of(running, running.decode)
    running.do(setattr, client, "_unsettled", 7)
    before = client._call
    running.do(before.cancel)
    running.until(lambda: client._call not in (None, before))
    assert client._unsettled is None


def test_a_node_that_says_that_it_drains_gets_nothing_more_though_the_registry_says_ready(
    new_gateway: NewGateway,
) -> None:
    running = new_gateway(num_prefill=2)
    leaver, other = prefill_nodes(running)
    entry = leaver.info
    drain(running, leaver)
    running.call(running.see(entry))  # a heartbeat of before
    for _ in range(6):
        assert post(running).status_code == 200
    assert (len(leaver.submitted), len(leaver.refused)) == (0, 0)
    assert len(other.submitted) == 6


def test_an_uncordon_undoes_it_at_once(new_gateway: NewGateway) -> None:
    running = new_gateway()
    drain(running, running.prefill)
    assert code_of(post(running)) == (503, "no_capacity")
    running.do(running.prefill.move_to, NodeState.READY)
    running.until(lambda: running.prefill.hub.is_answered)
    assert post(running).status_code == 200
    assert not client_of(running, running.prefill).departure.is_in_order


def test_what_reaches_a_node_before_the_gateway_has_heard_is_refused_and_moved_on(
    new_gateway: NewGateway, expected: str
) -> None:
    """Every node of a rolling restart but one refuses: a stream may meet them all."""
    running = new_gateway(num_prefill=5)
    *leavers, last = prefill_nodes(running)

    for leaver in leavers:
        leaver.info = replace(leaver.info, state=NodeState.DRAINING)
    budget = running.gateway.dispatcher._budget
    while budget.withdraw():
        pass
    for _ in range(4):
        response = post(running)
        assert response.json()["choices"][0]["text"] == expected
    assert len(last.submitted) == 4
    assert sum(len(leaver.refused) for leaver in leavers) >= 4


def test_what_cost_no_retry_gives_none_back_when_there_is_no_other_node(
    new_gateway: NewGateway,
) -> None:
    running = new_gateway()
    running.prefill.info = replace(running.prefill.info, state=NodeState.DRAINING)
    budget = running.gateway.dispatcher._budget
    while budget.withdraw():
        pass
    for _ in range(5):
        assert code_of(post(running)) == (503, "no_capacity")
    assert not budget.withdraw()


def test_a_session_that_comes_back_in_the_drain_begins_with_it(new_gateway: NewGateway) -> None:
    running = new_gateway(num_prefill=2)
    leaver = running.prefill
    client = client_of(running, leaver)
    entry = leaver.info
    drain(running, leaver)
    lost_before = client._call
    running.do(lost_before.cancel)
    running.until(lambda: client._call not in (None, lost_before))
    running.until(lambda: leaver.hub.is_answered)
    running.call(running.see(entry))
    assert state_of(running, "prefill-0") is NodeState.DRAINING
    assert client.departure.presence is Presence.LEAVING


def test_what_one_incarnation_said_is_not_held_against_the_next(new_gateway: NewGateway) -> None:
    running = new_gateway()
    port = int(running.prefill.info.grpc_address.rpartition(":")[2])
    old = client_of(running, running.prefill)
    drain(running, running.prefill)
    running.call(running.prefill.kill())

    async def restart() -> None:
        node = FakeNode(NodeRole.PREFILL, "prefill-0", peers=running.nodes)
        await running.see(await node.start(port))

    running.call(restart())
    running.until(lambda: running.gateway.is_ready)
    assert post(running).status_code == 200
    fresh = client_of(running, running.prefill)
    assert (old.departure.is_in_order, fresh.departure.is_in_order) == (True, False)
    running.do(running.gateway.dispatcher.on_state, old, NodeState.DRAINING)
    assert state_of(running, "prefill-0") is NodeState.READY, "a late word of the old one"


def test_two_gateways_hear_of_it_each_for_itself(new_gateway: NewGateway, expected: str) -> None:
    running, other = new_gateway(num_prefill=2), new_gateway(num_prefill=0, num_decode=0)
    other.call(other.see(*(node.info for node in running.nodes.values())))
    other.until(lambda: other.gateway.is_ready)
    drain(running, running.prefill)
    other.until(lambda: state_of(other, "prefill-0") is NodeState.DRAINING)
    assert state_of(running, "prefill-0") is NodeState.DRAINING
    for each in (running, other):
        assert post(each).json()["choices"][0]["text"] == expected
    assert not running.prefill.submitted


def test_the_answer_stands_behind_what_was_submitted_before(new_gateway: NewGateway) -> None:
    """So a node whose notice was heard has read all that it will ever get."""
    running = new_gateway()
    client = client_of(running, running.prefill)

    def submit_and_hear() -> list[str | None]:
        client.send(pb.GatewayFrame(submit=pb.Submit()))
        client._on_notice(pb.StateNotice(state="draining", number=7))
        client.settle()  # it is settled, and says so once
        frames, client._frames = list(client._frames), type(client._frames)()
        assert [frame.state_answer.is_settled for frame in frames[1:]] == [False, True]
        return [frame.WhichOneof("frame") for frame in frames]

    assert running.do(submit_and_hear) == ["submit", "state_answer", "state_answer"]


class ScriptedCall:
    """A session on which a node says this, and ends it in order."""

    def __init__(self, *frames: pb.NodeFrame) -> None:
        self._frames = [*frames, grpc.aio.EOF]

    async def read(self) -> Any:
        return self._frames.pop(0)


def test_a_newer_node_may_say_what_this_gateway_does_not_know(new_gateway: NewGateway) -> None:
    running = new_gateway()
    client = client_of(running, running.prefill)
    unknown = pb.NodeFrame.FromString(b"\xfa\x01\x00")  # field 31, empty
    dozing = pb.NodeFrame(state_notice=pb.StateNotice(state="dozing", number=1))
    last = pb.NodeFrame(state_notice=pb.StateNotice(state="draining", number=2))
    running.call(client._read(ScriptedCall(unknown, dozing)))
    assert state_of(running, "prefill-0") is NodeState.READY
    running.call(client._read(ScriptedCall(unknown, dozing, last)))
    assert state_of(running, "prefill-0") is NodeState.DRAINING


def test_a_frame_that_makes_no_sense_ends_the_session(new_gateway: NewGateway) -> None:
    running = new_gateway()
    client = client_of(running, running.prefill)
    with pytest.raises(InvalidRequest):
        running.call(client._read(ScriptedCall(pb.NodeFrame(welcome=pb.NodeDescription()))))
