"""An answer whose decode node was lost on the way is the one that nothing disturbed, in all of its
parts: text, log-probabilities, endings, counts."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.gateway.test_failures import everything_is_given_back

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gateway.running_gateway import RunningGateway

PROMPT = "one two three four five six seven eight nine ten"
ASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "log-probabilities": {"logprobs": 2},
    "several choices": {"n": 3},
    "a stop string that is cut in two": {"stop": ["e fo", "nothing"]},
    "a stop string that is too early": {"stop": "two", "min_tokens": 9},
    "as long as it may be": {"ignore_eos": True, "max_tokens": 30},
    "ids": {"return_token_ids": True},
}


class Allowance:
    """Lets so many tokens pass, then none until it is `set`."""

    def __init__(self, num_tokens: int) -> None:
        self._left = num_tokens
        self._opened = asyncio.Event()

    async def wait(self) -> None:
        self._left -= 1
        if self._left < 0:
            await self._opened.wait()

    def set(self) -> None:
        self._opened.set()


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("kind", sorted(ASKS))
def test_an_answer_that_was_recovered_is_the_same(
    kind: str, is_stream: bool, new_gateway: Callable[..., RunningGateway]
) -> None:
    body = {"model": "org/test-model", "prompt": PROMPT, "max_tokens": 64, **ASKS[kind]}
    if is_stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    running = new_gateway(num_decode=2, stream_recovery=True)
    expected = ask(running, body)
    victim = disturbed_at(running, 2 * body.get("n", 1))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, running, body)
        victim()
        assert answer.result(20) == expected
    assert running.gateway.measures.retries["recovery", "decode_lost"] >= 1
    everything_is_given_back(running)


def disturbed_at(running: RunningGateway, num_tokens: int) -> Callable[[], None]:
    """Both decode nodes stop there; calling the result kills one that works."""
    nodes = [running.nodes[f"decode-{number}"] for number in range(2)]
    running.until(lambda: all(node.is_idle for node in nodes))
    gates = [Allowance(num_tokens) for _ in nodes]
    for node, gate in zip(nodes, gates, strict=True):
        running.do(setattr, node.gates, "tokens", gate)

    def kill() -> None:
        running.until(lambda: any(gate._left < 0 for gate in gates))
        active = running.gateway.dispatcher.active
        running.until(lambda: any(each.num_output_tokens > 1 for each in active.values()))
        at = next(index for index, node in enumerate(nodes) if not node.is_idle)
        running.do(gates[1 - at].set)
        running.call(nodes[at].kill())

    return kill


def ask(running: RunningGateway, body: dict[str, Any]) -> dict[str, Any]:
    url = f"{running.url}/v1/completions"
    if not body.get("stream"):
        response = httpx.post(url, json=body, timeout=20)
        assert response.status_code == 200, response.text
        whole: dict[str, Any] = response.json()
        return {"usage": whole["usage"], "choices": whole["choices"]}
    with httpx.stream("POST", url, json=body, timeout=20) as response:
        return joined([line[6:] for line in response.iter_lines() if line])


def joined(events: list[str]) -> dict[str, Any]:
    """The pieces of each choice, one after the other."""
    assert events[-1] == "[DONE]"
    usage, choices = None, defaultdict[int, dict[str, Any]](dict)
    for event in map(json.loads, events[:-1]):
        usage = event.get("usage") or usage
        for piece in event["choices"]:
            whole = choices[piece["index"]]
            for name, value in piece.items():
                if name == "logprobs" and value is not None:
                    value = {key: tuple(each) for key, each in value.items()}
                    before = whole.get(name) or dict.fromkeys(value, ())
                    whole[name] = {key: before[key] + value[key] for key in value}
                elif name in ("text", "token_ids"):
                    whole[name] = whole.get(name, type(value)()) + value
                elif value is not None:
                    whole[name] = value
    return {"usage": usage, "choices": dict(choices)}
