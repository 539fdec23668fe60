"""Writes the answer of a generation to its client, streamed or whole, on raw ASGI.

Life of a stream
    1. Nothing is sent until the first token, an error, or the keep-alive interval: an error
       before that is a plain HTTP answer with its own status.
    2. From then on each wake-up is one write: the frames of all choices that have something new.
    3. It ends with usage where asked for and `[DONE]`; an error in between is one error object,
       then `[DONE]`.

A watcher hears of a client that leaves and ends the generation at once, also while the answer
is still being waited for. A client that stops reading holds at most the socket's buffer; after
`write_timeout` seconds of that it is taken for gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from gateway.answers import whole_answer
from gateway.choice import Piece
from gateway.dialects.messages_frames import MessagesFrames, message_object
from gateway.dialects.responses_frames import ResponsesFrames, response_object
from gateway.frames import KEEP_ALIVE, Frames
from gateway.http_errors import send_error, send_json
from gateway.request import Route

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Receive, Send

    from cluster.clock import Clock
    from cluster.errors import ServingError
    from gateway.choice import Choice
    from gateway.detokenizer import TokenBytes
    from gateway.generation import Generation
    from gateway.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
HTTP_OK = 200
# In one write. What gathers behind a client that does not read, each with twenty log-probabilities,
# takes seconds to write.
MAX_TOKENS_AT_ONCE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamTimes:
    """Seconds. `keep_alive` 0: no comments."""

    keep_alive: float
    write_timeout: float

    @property
    def tick(self) -> float:
        """How often a stream looks at its clock."""
        return min(self.keep_alive or self.write_timeout, self.write_timeout) / 2


class AnswerFrames(Protocol):
    """What a stream of one API consists of."""

    def render(self, choice: Choice, piece: Piece) -> bytes:
        """What is new in one choice; empty when nothing is to be shown yet."""

    def last(self) -> bytes:
        """After all choices have ended well."""

    def error(self, error: ServingError) -> bytes:
        """Instead of `last`, when it ended badly."""


def _frames(generation: Generation, token_bytes: TokenBytes) -> AnswerFrames:
    if generation.request.route is Route.RESPONSES:
        return ResponsesFrames(generation)
    if generation.request.route is Route.MESSAGES:
        return MessagesFrames(generation)
    return Frames(generation, token_bytes)


def _whole(generation: Generation, pieces: list[Piece], token_bytes: TokenBytes) -> dict[str, Any]:
    if generation.request.route is Route.RESPONSES:
        return response_object(generation, pieces[0])
    if generation.request.route is Route.MESSAGES:
        return message_object(generation, pieces[0])
    return whole_answer(generation, pieces, token_bytes)


async def _watch_disconnect(receive: Receive, generation: Generation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.leave()


@contextlib.asynccontextmanager
async def _in_flight(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """While its answer is written: watched for the client's leaving, closed in the end."""
    watcher = asyncio.create_task(_watch_disconnect(receive, generation))
    try:
        yield
    finally:
        watcher.cancel()
        generation.close()


async def write_whole(
    generation: Generation, tokenizer: Tokenizer, receive: Receive, send: Send, *, clock: Clock
) -> None:
    """The answer as one JSON object, or the error that ended it."""
    async with _in_flight(receive, generation):
        pieces = [Piece() for _ in generation.choices]
        while not generation.is_finished:
            await generation.wait()
            for choice, whole in zip(generation.choices, pieces, strict=True):
                whole.extend(choice.take())
                generation.settle(choice)
        if generation.has_disconnected:
            return
        if generation.error is not None:
            await send_error(send, generation.error, generation.request.message_id)
            return
        num_logprobs = sum(1 + len(each.top) for piece in pieces for each in piece.logprobs)
        body = await tokenizer.run(
            lambda: orjson.dumps(_whole(generation, pieces, tokenizer.token_bytes)),
            num_logprobs,
        )
        took_ms = str(int((clock() - generation.arrived_at) * 1000)).encode()
        generation.first_token_sent(generation.first_at)
        await send_json(send, HTTP_OK, body, [(b"openai-processing-ms", took_ms)])


class StreamWriter:
    """Writes one stream; see the module. `run` returns when the answer is complete."""

    def __init__(
        self,
        generation: Generation,
        token_bytes: TokenBytes,
        send: Send,
        *,
        times: StreamTimes,
        clock: Clock,
    ) -> None:
        self._generation = generation
        self._frames = _frames(generation, token_bytes)
        self._send = send
        self._times = times
        self._clock = clock
        self._has_started = False
        self._has_sent_token = False
        self._wrote_at = clock()
        self._is_writing = False
        self._wants_keep_alive = False
        self._is_stalled = False

    async def run(self, receive: Receive) -> None:
        ticking = asyncio.create_task(self._tick(asyncio.current_task()))
        try:
            async with _in_flight(receive, self._generation):
                await self._write_all()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._is_stalled or (task is not None and task.uncancel() > 0):
                raise
        finally:
            ticking.cancel()

    async def _write_all(self) -> None:
        generation = self._generation
        while not generation.is_finished:
            await generation.wait()
            if generation.error is None:
                await self._write_new()
        if generation.error is not None and not generation.has_disconnected:
            await self._write_error()

    async def _write_new(self) -> None:
        generation = self._generation
        body = b""
        left = MAX_TOKENS_AT_ONCE
        for choice in generation.choices:
            if choice.has_unread and left > 0:
                left -= choice.num_unread_tokens
                piece = choice.take(left + choice.num_unread_tokens)
                left += choice.num_unread_tokens
                generation.settle(choice)
                body += self._frames.render(choice, piece)
        if left <= 0:
            generation.wake()  # for the rest, when others have had their turn
        if generation.error is not None:
            # What came before the error is still the client's; nothing alone says it began.
            if body and self._has_started:
                await self._write(body)
            return
        if generation.is_finished:
            await self._write(body + self._frames.last(), is_last=True)
        elif body:
            await self._write(body)
        elif self._wants_keep_alive:
            await self._write(KEEP_ALIVE)
        if body and not self._has_sent_token:
            self._has_sent_token = True
            generation.first_token_sent(self._clock())

    async def _write_error(self) -> None:
        error = self._generation.error
        if error is None:
            return
        if not self._has_started:
            await send_error(self._send, error, self._generation.request.message_id)
            return
        await self._write(self._frames.error(error), is_last=True)

    async def _write(self, body: bytes, *, is_last: bool = False) -> None:
        if not self._has_started:
            self._has_started = True
            await self._send(
                {"type": "http.response.start", "status": HTTP_OK, "headers": STREAM_HEADERS}
            )
        self._wants_keep_alive = False
        self._is_writing = True
        self._wrote_at = self._clock()
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})
        self._is_writing = False

    async def _tick(self, writer: asyncio.Task[object] | None) -> None:
        """Ask for a comment in a quiet stream; end one whose client does not read."""
        times = self._times
        while True:
            await asyncio.sleep(times.tick)
            quiet_for = self._clock() - self._wrote_at
            if self._is_writing and quiet_for >= times.write_timeout and writer is not None:
                logger.info("a client stopped reading its stream")
                self._is_stalled = True
                self._generation.leave()
                writer.cancel()
                return
            if times.keep_alive and not self._is_writing and quiet_for >= times.keep_alive:
                self._wants_keep_alive = True
                self._generation.wake()
