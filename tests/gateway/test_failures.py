"""Whatever breaks, each client it touches gets one typed error, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest

from cluster.errors import NodeUnavailable, TransferFailed
from cluster.node import NodeId, NodeName, NodeRole, NodeState, new_incarnation
from gateway import node_client, streaming
from gateway.pulse import Pulse
from tests.gateway.fake_node import FakeNode
from tests.gateway.running_gateway import RunningGateway

MODEL = "org/test-model"
NewGateway = Callable[..., RunningGateway]


def body(**changes: Any) -> dict[str, Any]:
    asked = {"model": MODEL, "prompt": "one two three", "max_tokens": 8, "ignore_eos": True}
    asked["add_special_tokens"] = False  # so that the first token is text
    return {**asked, **changes}


def post(running: RunningGateway, **changes: Any) -> httpx.Response:
    return httpx.post(f"{running.url}/v1/completions", json=body(**changes), timeout=20)


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


class OpenStream:
    """A stream that is being read on another thread, event by event."""

    def __init__(self, running: RunningGateway, **changes: Any) -> None:
        self.events: list[str] = []
        self.has_text = threading.Event()
        self._arguments = (running, changes)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        running, changes = self._arguments
        url = f"{running.url}/v1/completions"
        with httpx.stream("POST", url, json=body(stream=True, **changes), timeout=20) as response:
            self.status = response.status_code
            for line in response.iter_lines():
                if line:
                    self.events.append(line.removeprefix("data: "))
                    self.has_text.set()

    def result(self) -> list[str]:
        self._thread.join(20)
        return self.events

    def error(self) -> str:
        """The code of the one error, which is the last event before `[DONE]`."""
        events = self.result()
        assert events[-1] == "[DONE]"
        errors = [json.loads(e)["error"]["code"] for e in events[:-1] if '"error"' in e]
        assert len(errors) == 1
        assert '"error"' in events[-2]
        return str(errors[0])


@pytest.fixture
def running(new_gateway: NewGateway) -> RunningGateway:
    return new_gateway()


def everything_is_given_back(running: RunningGateway) -> None:
    admission, measures = running.gateway.admission, running.gateway.measures
    running.until(lambda: not running.gateway.dispatcher.active)
    assert (admission.num_sequences, admission.num_queued, admission.num_queued_tokens) == (0, 0, 0)
    assert (measures.num_waiting, measures.num_running) == (0, 0)
    for entry in running.gateway.nodes:
        tally = entry.tally
        assert (tally.num_sequences, tally.queued_tokens, tally.reserved_tokens) == (0, 0, 0)


def test_a_decode_node_killed_mid_stream_is_one_error_event(running: RunningGateway) -> None:
    running.do(running.decode.gates.tokens.clear)
    stream = OpenStream(running)
    assert stream.has_text.wait(10)
    running.until(lambda: not running.prefill._tasks)
    running.call(running.decode.kill())
    assert stream.error() == "node_lost"
    everything_is_given_back(running)


def test_only_a_session_that_breaks_is_called_lost(
    running: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway.node_client")
    running.call(running.prefill.kill())
    running.until(lambda: "lost prefill node prefill-0" in caplog.messages)
    running.do(running.decode.hub.close_all)
    running.until(lambda: "parted from decode node decode-0" in caplog.messages)
    running.until(lambda: "connected to decode node decode-0" in caplog.messages)
    running.call(running.gateway.nodes.close())
    assert "left decode node decode-0" in caplog.messages
    assert not any("lost decode" in message for message in caplog.messages)


def test_the_log_of_a_failed_request_names_its_nodes_and_the_cause(
    running: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    running.do(running.decode.gates.tokens.clear)
    stream = OpenStream(running)
    assert stream.has_text.wait(10)
    running.until(lambda: not running.prefill._tasks)
    running.call(running.decode.kill())
    stream.error()
    running.until(lambda: "request ended" in caplog.messages)
    records = {record.message: record.__dict__ for record in caplog.records}
    ended, attempt = records["request ended"], records["an attempt failed: the client is told"]
    assert (ended["levelname"], ended["status"]) == ("WARNING", 503)
    assert ended["num_retries"] == 0
    for facts in (ended, attempt):
        assert facts["nodes"] == "prefill-0 > decode-0"
        assert (facts["error"], facts["reason"]) == ("node_lost", "decode_lost")
    assert attempt["request_id"]
    assert attempt["sequence_id"] in running.prefill.submitted


def test_an_answered_request_is_no_warning_and_names_its_nodes(
    running: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert post(running, n=2).status_code == 200
    (ended,) = [r.__dict__ for r in caplog.records if r.message == "request ended"]
    assert (ended["levelname"], ended["nodes"]) == ("INFO", "prefill-0 > decode-0")
    assert (ended["error"], ended["reason"], ended["num_retries"]) == (None, None, 0)


def test_a_prefill_node_killed_before_its_token_is_a_503(running: RunningGateway) -> None:
    running.do(running.prefill.gates.first_token.clear)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, running, stream=True)
        running.until(lambda: running.prefill.submitted)
        running.call(running.prefill.kill())
        response = answer.result(20)
    assert code_of(response) == (503, "node_lost")
    assert response.headers["retry-after"]
    assert response.headers["x-should-retry"] == "true"
    everything_is_given_back(running)


def test_a_prefill_node_killed_after_the_start_costs_nothing(running: RunningGateway) -> None:
    running.do(running.decode.gates.tokens.clear)
    stream = OpenStream(running)
    running.until(lambda: [a for a in _active(running) if a.state.name == "STARTED"])
    running.call(running.prefill.kill())
    running.do(running.decode.gates.tokens.set)
    events = stream.result()
    assert events[-1] == "[DONE]"
    assert not any('"error"' in event for event in events)
    everything_is_given_back(running)


def test_an_orphan_that_decode_runs_goes_on(running: RunningGateway) -> None:
    """The prefill node dies between its token and `started`; the decode node has the KV."""
    running.do(running.decode.gates.start.clear)
    stream = OpenStream(running)
    running.until(lambda: running.decode.submitted)
    running.call(running.prefill.kill())
    running.until(lambda: running.decode.asked_about)
    running.do(running.decode.gates.start.set)
    events = stream.result()
    assert not any('"error"' in event for event in events)
    assert '"finish_reason":"length"' in events[-2]


def test_an_orphan_that_nobody_answers_for_ends_in_seconds(running: RunningGateway) -> None:
    running.do(running.prefill.gates.hand_off.clear)
    stream = OpenStream(running)
    assert stream.has_text.wait(10)
    running.call(running.prefill.kill())
    assert stream.error() == "node_lost"
    assert running.decode.asked_about
    running.until(lambda: running.decode.cancelled)
    everything_is_given_back(running)


def test_an_error_before_the_first_token_has_its_own_status(running: RunningGateway) -> None:
    running.prefill.error = TransferFailed("The KV did not arrive.", reason="digest_mismatch")
    for is_stream in (False, True):
        response = post(running, stream=is_stream)
        assert code_of(response) == (503, "kv_load_failed")
    running.until(lambda: len(running.decode.cancelled) == 2)
    everything_is_given_back(running)


def test_a_client_is_told_the_cause_of_kv_that_was_not_loaded_and_when_to_return(
    running: RunningGateway,
) -> None:
    for reason, cause in (("digest_mismatch", "digest_mismatch"), ("incomplete", "unknown")):
        running.prefill.error = TransferFailed(
            "The KV did not arrive.", reason=reason, retry_after_seconds=1.0
        )
        response = post(running)
        assert response.json()["error"]["cause"] == cause
        assert response.headers["retry-after"] == "1"
        assert response.headers["x-request-id"]
    running.until(lambda: len(running.decode.cancelled) == 2)


def test_an_error_after_the_first_token_is_an_event(running: RunningGateway) -> None:
    running.decode.error = TransferFailed("The KV did not arrive.")
    running.do(running.decode.gates.start.clear)
    stream = OpenStream(running)
    assert stream.has_text.wait(20)
    running.do(running.decode.gates.start.set)
    assert stream.error() == "kv_load_failed"
    assert code_of(post(running)) == (503, "kv_load_failed")
    everything_is_given_back(running)


def test_one_failed_choice_ends_the_whole_request(running: RunningGateway) -> None:
    running.do(running.decode.gates.tokens.clear)
    stream = OpenStream(running, n=4)
    running.until(lambda: len(_active(running)) == 4)
    running.until(lambda: all(a.state.name == "STARTED" for a in _active(running)))
    running.do(running.gateway.dispatcher.fail, _active(running)[0], TransferFailed("x"))
    assert stream.error() == "kv_load_failed"
    everything_is_given_back(running)


def test_a_node_that_is_silent_and_does_not_answer_is_lost(new_gateway: NewGateway) -> None:
    running = new_gateway(probe_after=0.1, probe_timeout=0.2)
    running.do(running.decode.gates.tokens.clear)

    def hang() -> Any:
        raise NodeUnavailable("does not answer")

    running.decode.description = hang  # type: ignore[method-assign]
    assert OpenStream(running).error() == "node_lost"


def test_a_node_whose_process_answers_no_pings_is_lost_long_before_it_is_asked(
    new_gateway: NewGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = new_gateway(probe_after=600.0, pulse_timeout=0.01)
    running.do(running.decode.gates.tokens.clear)
    stream = OpenStream(running)
    assert stream.has_text.wait(20)
    monkeypatch.setattr(Pulse, "answered", lambda *_: None)  # as if none came
    assert stream.error() == "node_lost"


def test_a_timeout_of_0_means_no_pings(
    new_gateway: NewGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_client, "PulseWatch", None)  # none is made
    running = new_gateway(pulse_timeout=0.0)
    assert not any('"error"' in event for event in OpenStream(running).result())


def test_a_silent_node_that_answers_is_kept(new_gateway: NewGateway) -> None:
    running = new_gateway(probe_after=0.05, probe_timeout=5.0)
    running.do(running.decode.gates.tokens.clear)
    num_probes: list[int] = []
    describe = running.decode.description

    def counted() -> Any:
        num_probes.append(1)
        return describe()

    running.decode.description = counted  # type: ignore[method-assign]
    stream = OpenStream(running)
    running.until(lambda: len(num_probes) >= 2)
    running.do(running.decode.gates.tokens.set)
    assert not any('"error"' in event for event in stream.result())


def test_an_idle_node_that_does_not_answer_is_lost_before_it_gets_work(
    new_gateway: NewGateway,
) -> None:
    running = new_gateway(probe_after=0.05, probe_timeout=0.2)
    running.until(lambda: running.gateway.is_ready)

    def hang() -> Any:
        raise NodeUnavailable("does not answer")

    running.decode.description = hang  # type: ignore[method-assign]
    running.until(lambda: not running.gateway.is_ready)


def test_without_a_pair_requests_are_refused_and_health_says_so(running: RunningGateway) -> None:
    running.call(running.decode.kill())
    running.until(lambda: not running.gateway.is_ready)
    response = post(running)
    assert code_of(response) == (503, "no_capacity")
    assert int(response.headers["retry-after"]) >= 1
    for path in ("readyz", "health"):
        answer = httpx.get(f"{running.url}/{path}")
        assert (answer.status_code, answer.text) == (503, "Not ready: no decode node is ready.\n")
    assert httpx.get(f"{running.url}/livez").status_code == 200


def test_a_node_that_returns_serves_again(running: RunningGateway) -> None:
    port = int(running.decode.info.grpc_address.rpartition(":")[2])
    running.call(running.decode.kill())
    running.until(lambda: not running.gateway.is_ready)

    async def restart() -> None:
        node = FakeNode(NodeRole.DECODE, "decode-0", peers=running.nodes)
        await running.see(await node.start(port))

    running.call(restart())
    running.until(lambda: running.gateway.is_ready)
    assert post(running).status_code == 200


def test_an_error_of_ours_costs_a_session_and_not_the_next(
    running: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = running.gateway.dispatcher
    on_deltas = dispatcher.on_deltas

    def break_once(*_: object) -> None:
        monkeypatch.setattr(dispatcher, "on_deltas", on_deltas)
        raise KeyError("nobody foresaw it")

    monkeypatch.setattr(dispatcher, "on_deltas", break_once)
    assert code_of(post(running)) == (503, "node_lost")
    running.until(lambda: running.gateway.is_ready)
    assert post(running).status_code == 200
    everything_is_given_back(running)


def test_another_process_at_a_known_address_is_not_taken_for_the_node(
    running: RunningGateway,
) -> None:
    """The same name, another incarnation, and the registry does not say so yet."""
    port = int(running.decode.info.grpc_address.rpartition(":")[2])
    running.call(running.decode.kill())

    async def restart() -> None:
        await FakeNode(NodeRole.DECODE, "decode-0", peers=running.nodes).start(port)

    running.call(restart())
    stranger = running.nodes["decode-0"]
    described: list[int] = []
    describe = stranger.description
    stranger.description = lambda: (described.append(1), describe())[1]  # type: ignore[method-assign,func-returns-value]
    running.until(lambda: described)
    assert code_of(post(running)) == (503, "no_capacity")


def test_an_entry_that_outlives_its_process_costs_the_next_one_at_its_address_no_session(
    running: RunningGateway,
) -> None:
    """As when a node has been started again under another name, or in the other role."""
    decode = running.decode
    running.do(decode.gates.tokens.clear)
    described: list[int] = []
    describe = decode.description
    decode.description = lambda: (described.append(1), describe())[1]  # type: ignore[method-assign,func-returns-value]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, running)
        running.until(lambda: decode.submitted)
        stale = NodeId(NodeName("earlier"), new_incarnation())
        running.call(running.see(replace(decode.info, id=stale)))
        running.until(lambda: len(described) > 1)  # tried again and again
        running.do(decode.gates.tokens.set)
        assert answer.result(20).status_code == 200


def test_a_full_gateway_refuses_before_it_reads_a_prompt(
    new_gateway: NewGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To take long texts apart only to refuse them would slow down everybody who was let in."""
    running = new_gateway(max_num_queued_reqs=1)
    running.do(running.prefill.gates.first_token.clear)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, running)
        running.until(lambda: running.prefill.submitted)
        monkeypatch.setattr(running.gateway, "validator", None)
        assert code_of(post(running, prompt="one " * 100_000)) == (503, "overloaded")
        running.do(running.prefill.gates.first_token.set)
        assert first.result(20).status_code == 200
    assert running.gateway.measures.rejections["max_num_queued_reqs"] == 1
    (_, refused), *_ = running.gateway.book.last(1, failed_only=True)
    assert (refused.status, refused.reason) == (503, "max_num_queued_reqs")


def test_too_much_is_refused_with_a_time_to_return(new_gateway: NewGateway) -> None:
    running = new_gateway(max_num_queued_reqs=1)
    running.do(running.prefill.gates.first_token.clear)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, running)
        running.until(lambda: running.prefill.submitted)
        refused = post(running, stream=True)
        running.do(running.prefill.gates.first_token.set)
        assert first.result(20).status_code == 200
    assert code_of(refused) == (503, "overloaded")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-should-retry"] == "true"
    assert running.gateway.measures.rejections["max_num_queued_reqs"] == 1


def test_a_quiet_stream_is_kept_alive_by_comments(new_gateway: NewGateway) -> None:
    running = new_gateway(sse_keep_alive_interval=0.05)
    running.do(running.prefill.gates.first_token.clear)
    stream = OpenStream(running)
    assert stream.has_text.wait(10)
    running.do(running.prefill.gates.first_token.set)
    events = stream.result()
    assert events[0] == ": keep-alive"
    assert events[-1] == "[DONE]"


def test_silence_beyond_patience_is_a_504(new_gateway: NewGateway) -> None:
    running = new_gateway(first_token_timeout=0.2)
    running.do(running.prefill.gates.first_token.clear)
    assert code_of(post(running)) == (504, "deadline_exceeded")
    running.until(lambda: running.prefill.cancelled)


def test_stopping_lets_streams_finish(new_gateway: NewGateway) -> None:
    running = new_gateway(shutdown_timeout=20.0)
    running.do(running.decode.gates.tokens.clear)
    stream = OpenStream(running)
    assert stream.has_text.wait(10)
    stopping = _stop_in_background(running)
    running.until(lambda: running.public.is_stopping)
    running.do(running.decode.gates.tokens.set)
    assert '"finish_reason":"length"' in stream.result()[-2]
    stopping.result(20)


def test_a_request_that_comes_as_the_gateway_is_told_to_stop_is_served(
    new_gateway: NewGateway,
) -> None:
    """Of it the gateway has read no more than a part."""
    running = new_gateway(shutdown_timeout=20.0)
    sent = json.dumps(body()).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(sent)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", running.public.port), timeout=20) as client:
        client.sendall(head.encode() + sent[:5])
        running.until(lambda: running.public._server.server_state.tasks)
        stopping = _stop_in_background(running)
        running.until(lambda: running.public.is_stopping)
        client.sendall(sent[5:])
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
    stopping.result(20)


def test_stopping_ends_what_does_not_finish_with_a_typed_error(new_gateway: NewGateway) -> None:
    running = new_gateway(shutdown_timeout=0.2)
    running.do(running.decode.gates.tokens.clear)
    stream = OpenStream(running)
    assert stream.has_text.wait(10)
    stopping = _stop_in_background(running)
    assert stream.error() == "no_capacity"
    stopping.result(20)
    running.until(lambda: running.decode.cancelled)


def test_a_gateway_that_ends_connects_to_no_node_again(new_gateway: NewGateway) -> None:
    """To lose its sessions changes its view of the cluster, which is applied like any other."""
    running = new_gateway()
    running.call(running.gateway.nodes.close())
    assert {info.state for info in running.membership.view.nodes.values()} == {NodeState.LOST}
    assert list(running.gateway.nodes) == []


@pytest.mark.parametrize(("write_timeout", "most"), [(0.2, streaming.MAX_UNREAD), (60.0, 1000)])
def test_a_client_that_does_not_read_is_given_up(
    new_gateway: NewGateway, monkeypatch: pytest.MonkeyPatch, write_timeout: float, most: int
) -> None:
    """After a while, or when much has gathered: one that reads a little now and then is never
    silent, and the nodes go on."""
    monkeypatch.setattr(streaming, "MAX_UNREAD", most)
    running = new_gateway(
        write_timeout=write_timeout,
        sse_keep_alive_interval=0.1,
        node_options={"max_model_len": 10**7},
    )
    stop = threading.Event()

    def never_read() -> None:
        url = f"{running.url}/v1/completions"
        asked = body(stream=True, max_tokens=10**6, logprobs=20)
        with httpx.stream("POST", url, json=asked, timeout=20):
            stop.wait(20)

    thread = threading.Thread(target=never_read)
    thread.start()
    running.until(lambda: running.gateway.measures.num_disconnected == 1)
    running.until(lambda: running.decode.is_idle)
    stop.set()
    thread.join(20)
    everything_is_given_back(running)


def _active(running: RunningGateway) -> list[Any]:
    return list(running.gateway.dispatcher.active.values())


def _stop_in_background(running: RunningGateway) -> Any:
    return asyncio.run_coroutine_threadsafe(running.stop_serving(), running.loop)
