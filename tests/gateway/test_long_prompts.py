"""A prompt that takes more bytes than a message may have ends, or runs; nobody else notices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx

from cluster.codec import encode_description
from cluster.message_size import BASE_MESSAGE_BYTES
from tests.gateway.fake_node import FakeNode
from tests.gateway.test_failures import OpenStream, body, everything_is_given_back

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from cluster.proto import node_pb2 as pb
    from tests.gateway.running_gateway import RunningGateway

NUM_TOKENS = BASE_MESSAGE_BYTES + 1  # each takes a byte at least


def asked_beside_a_stream(new_gateway: Callable[..., RunningGateway]) -> httpx.Response:
    """The answer to a long prompt; a stream that the same nodes work on has to end well."""
    options = {"max_model_len": NUM_TOKENS + 100}
    running = new_gateway(node_options=options, max_body_bytes=64 * 2**20)
    running.do(running.decode.gates.tokens.clear)
    stream = OpenStream(running)
    assert stream.has_text.wait(10)
    asked: dict[str, Any] = body(prompt=[5] * NUM_TOKENS, max_tokens=1)
    response = httpx.post(f"{running.url}/v1/completions", json=asked, timeout=60)
    running.do(running.decode.gates.tokens.set)
    events = stream.result()
    assert events[-1] == "[DONE]"
    assert not any('"error"' in event for event in events)
    everything_is_given_back(running)
    return response


def test_the_longest_prompt_of_a_model_is_no_message_too_large(
    new_gateway: Callable[..., RunningGateway],
) -> None:
    answer = asked_beside_a_stream(new_gateway).json()
    assert answer["usage"]["prompt_tokens"] == NUM_TOKENS


def test_what_a_node_does_not_take_is_refused_before_it_could_end_the_session(
    new_gateway: Callable[..., RunningGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that does not say what it takes is older: it takes 4 MiB."""

    def older(node: FakeNode) -> pb.NodeDescription:
        said = encode_description(node.info, version="test")
        said.ClearField("max_message_bytes")
        return said

    monkeypatch.setattr(FakeNode, "description", older)
    refused = asked_beside_a_stream(new_gateway)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
