"""Writes the answer of a generation whole: one JSON object, for clients that do not stream.

Life of a whole answer
    1. What has come is read now and then (`generation.py`), and kept (`held_answer.py`).
    2. When all choices have ended it is rendered in parts: after about a millisecond of that others
       have their turn. A short one is sent with its length.
    3. A long one is sent part by part, as its client reads it; it never exists as a whole. A client
       that leaves ends it, one that does not read for `write_timeout` seconds is cut off.

An error before that is a plain HTTP answer with its own status.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import orjson

from gateway.answers import answer_parts
from gateway.dialects.messages_frames import message_object
from gateway.dialects.responses_frames import response_object
from gateway.held_answer import HeldAnswer
from gateway.http_errors import JSON, send_error, send_json
from gateway.lost_clients import ClientStalled
from gateway.request import Route
from gateway.turns import in_flight, read_turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from starlette.types import Receive, Send

    from cluster.clock import Clock
    from gateway.detokenizer import TokenBytes
    from gateway.generation import Generation
    from gateway.http_errors import Headers

HTTP_OK = 200
PART_BYTES = 64 * 1024  # sent in one write
TURN_SECONDS = 0.001  # rendered between two turns of others, but for a part that takes longer


async def write_whole(
    generation: Generation,
    token_bytes: TokenBytes,
    receive: Receive,
    send: Send,
    *,
    write_timeout: float,
    clock: Clock,
) -> None:
    """The answer as one JSON object, or the error that ended it. Raises `ClientStalled`."""
    async with in_flight(receive, generation) as has_left:
        held = await _gathered(generation)
        if generation.has_disconnected:
            return
        if generation.error is not None:
            await send_error(send, generation.error, generation.request.message_id)
            return
        took_ms = str(int((clock() - generation.arrived_at) * 1000)).encode()
        headers = [(b"openai-processing-ms", took_ms)]
        generation.first_token_sent(generation.first_at)
        try:
            parts = Rendered(_parts(generation, held, token_bytes), clock)
            has_all = await _send(
                send, parts, headers, write_timeout=write_timeout, has_left=has_left
            )
            if not has_all:
                generation.abandon()
        except TimeoutError:
            generation.abandon()
            raise ClientStalled from None


async def _gathered(generation: Generation) -> list[HeldAnswer]:
    """All that comes, until all choices have ended or one has failed."""
    held = [HeldAnswer() for _ in generation.choices]
    while not generation.is_finished:
        await generation.wait()
        for choice, piece in read_turn(generation):
            held[choice.index].add(piece)
        await asyncio.sleep(0)
    return held


def _parts(
    generation: Generation, held: Sequence[HeldAnswer], token_bytes: TokenBytes
) -> Iterator[bytes]:
    route = generation.request.route
    if route is Route.RESPONSES:
        return iter((orjson.dumps(response_object(generation, held[0].piece())),))
    if route is Route.MESSAGES:
        return iter((orjson.dumps(message_object(generation, held[0].piece())),))
    return answer_parts(generation, held, token_bytes)


async def _send(
    send: Send,
    parts: Rendered,
    headers: Headers,
    *,
    write_timeout: float,
    has_left: Callable[[], bool],
) -> bool:
    """False when the client leaves before the end. Raises `TimeoutError` when it does not read."""
    body = await parts.next()
    following = await parts.next() if len(body) >= PART_BYTES else b""
    if not following:
        await send_json(send, HTTP_OK, body, headers)
        return True
    start = [(b"content-type", JSON), *headers]
    await send({"type": "http.response.start", "status": HTTP_OK, "headers": start})
    while body and not has_left():
        message = {"type": "http.response.body", "body": body, "more_body": bool(following)}
        async with asyncio.timeout(write_timeout):
            await send(message)
        await asyncio.sleep(0)
        body, following = following, await parts.next() if following else b""
    return not body


class Rendered:
    """An answer that is rendered while others have their turns."""

    def __init__(self, parts: Iterator[bytes], clock: Clock) -> None:
        self._parts = parts
        self._clock = clock

    async def next(self) -> bytes:
        """Enough for one write, or what is left."""
        joined, began = b"", self._clock()
        for part in self._parts:
            joined += part
            if len(joined) >= PART_BYTES:
                break
            if self._clock() - began >= TURN_SECONDS:
                await asyncio.sleep(0)
                began = self._clock()
        return joined
