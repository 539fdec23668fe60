"""Clients that ask and record what comes, on a thread and an event loop of their own.

Life of a client
    1. It sends its request; where nobody takes the connection it tries again, as any client
       would, until its deadline.
    2. It records each line of the answer, until the end or until it leaves.
    3. One that has no end when its deadline and a grace are over is recorded as hung.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import aiohttp

from tests.faults.history import NO_REQUEST, History, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.faults.asks import Ask

# What a busy machine may add to a deadline before a request counts as hung.
GRACE_SECONDS = 30.0
AGAIN_SECONDS = 0.05
MAX_LINE_BYTES = 1 << 20
OK = 200


class Gone(Exception):
    """The client has left."""


async def ask_once(session: aiohttp.ClientSession, history: History, url: str, ask: Ask) -> None:
    """Send one request to `url` and record what comes."""
    history.record(ask.number, "sent")
    try:
        async with asyncio.timeout(ask.deadline_seconds + GRACE_SECONDS):
            response = await _reach(session, history, url, ask)
            async with response:
                await _record(history, ask, response)
    except Gone:
        history.record(ask.number, "left")
    except TimeoutError:
        history.record(ask.number, "hung")
    except (aiohttp.ClientError, ConnectionError) as error:
        history.record(ask.number, "broken", detail=type(error).__name__)


async def _reach(
    session: aiohttp.ClientSession, history: History, url: str, ask: Ask
) -> aiohttp.ClientResponse:
    is_noted = False
    while True:
        try:
            return await session.post(f"{url}/completions", json=ask.body, headers=ask.headers)
        except aiohttp.ClientConnectorError:
            if not is_noted:
                history.record(ask.number, "unreachable")
            is_noted = True
            await asyncio.sleep(AGAIN_SECONDS)


async def _record(history: History, ask: Ask, response: aiohttp.ClientResponse) -> None:
    if response.status != OK:
        answer = await response.json()
        history.record(ask.number, "refused", detail=str(answer["error"]["code"]))
    elif not ask.is_stream:
        answer = await response.json()
        _record_choices(history, ask, answer["choices"])
        history.record(ask.number, "usage", usage=_usage(answer["usage"]))
    else:
        await _record_stream(history, ask, response)


def _record_choices(history: History, ask: Ask, choices: list[dict[str, Any]]) -> None:
    """Those of a whole answer, one behind the other."""
    in_order = sorted(choices, key=lambda choice: int(choice["index"]))
    for choice in in_order:
        history.record(ask.number, "tokens", token_ids=choice["token_ids"])
        _compare_logprobs(history, ask, choice)
    reasons = [choice["finish_reason"] for choice in in_order]
    history.record(ask.number, "finished", detail=", ".join(dict.fromkeys(reasons)))


async def _record_stream(history: History, ask: Ask, response: aiohttp.ClientResponse) -> None:
    num_tokens = 0
    if ask.leaves_after == 0:
        _leave(ask, response)
    async for raw in response.content:
        line = raw.decode().strip()
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            history.record(ask.number, "done")
            continue
        num_tokens += _record_event(history, ask, json.loads(line.removeprefix("data: ")))
        if ask.leaves_after is not None and num_tokens >= ask.leaves_after:
            _leave(ask, response)


def _record_event(history: History, ask: Ask, event: dict[str, Any]) -> int:
    """How many tokens came with it."""
    if "error" in event:
        history.record(ask.number, "failed", detail=str(event["error"]["code"]))
        return 0
    num_tokens = 0
    for choice in event["choices"]:
        if token_ids := choice.get("token_ids"):
            history.record(ask.number, "tokens", token_ids=token_ids)
            _compare_logprobs(history, ask, choice)
            num_tokens += len(token_ids)
        if choice["finish_reason"] is not None:
            history.record(ask.number, "finished", detail=choice["finish_reason"])
    if event.get("usage") is not None:
        history.record(ask.number, "usage", usage=_usage(event["usage"]))
    return num_tokens


def _compare_logprobs(history: History, ask: Ask, choice: dict[str, Any]) -> None:
    """One for each token, where they were asked for."""
    if "logprobs" not in dict(ask.more):
        return
    num_told = len((choice["logprobs"] or {"token_logprobs": ()})["token_logprobs"])
    if num_told != len(choice["token_ids"]):
        what = f"{num_told} log-probabilities for {len(choice['token_ids'])} tokens"
        history.record(NO_REQUEST, "contradiction", detail=f"request {ask.number}: {what}")


def _usage(told: dict[str, Any]) -> Usage:
    return Usage(
        prompt=told["prompt_tokens"],
        completion=told["completion_tokens"],
        total=told["total_tokens"],
        cached=told["prompt_tokens_details"]["cached_tokens"],
    )


def _leave(ask: Ask, response: aiohttp.ClientResponse) -> None:
    """Close the connection: by FIN, or by RST."""
    connection = response.connection
    transport = None if connection is None else connection.transport
    if ask.leaves_by_reset and transport is not None:
        raw: socket.socket = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    response.close()
    raise Gone


async def ask_all(
    history: History, url_of: Callable[[Ask], str], asks: Iterable[Ask], *, at_once: int
) -> None:
    """Ask all of it, `at_once` requests at a time, each on a connection of its own."""
    waiting = iter(asks)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, read_bufsize=MAX_LINE_BYTES
    ) as session:

        async def client() -> None:
            for ask in waiting:
                await ask_once(session, history, url_of(ask), ask)

        await asyncio.gather(*(client() for _ in range(at_once)))


@contextmanager
def load(
    url_of: Callable[[Ask], str],
    asks: Iterable[Ask],
    *,
    at_once: int,
    history: History | None = None,
) -> Iterator[History]:
    """Clients ask during the block; all have ended when it is left."""
    record = History() if history is None else history
    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(ask_all(record, url_of, asks, at_once=at_once))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="clients")
    thread.start()
    try:
        yield record
    finally:
        thread.join()
    if failures:
        raise failures[0]
