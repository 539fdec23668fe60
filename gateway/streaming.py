"""Writes the answer of a generation to its client as a stream, on raw ASGI.

Life of a stream
    1. Nothing is sent until the first token, an error, or the keep-alive interval: an error
       before that is a plain HTTP answer with its own status.
    2. From then on each wake-up is one write: the frames of all choices that have something new.
    3. It ends with usage where asked for and `[DONE]`; an error in between is one error object,
       then `[DONE]`.

A watcher hears of a client that leaves and ends the generation at once, also while the answer
is still being waited for. A client that reads nothing for `write_timeout` seconds is taken for
gone, and cut off; so is one behind whose slow reading too much has gathered.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from gateway.dialects.messages_frames import MessagesFrames
from gateway.dialects.responses_frames import ResponsesFrames
from gateway.frames import Frames
from gateway.http_errors import send_error
from gateway.lost_clients import ClientStalled
from gateway.request import Route
from gateway.turns import in_flight, read_turn

if TYPE_CHECKING:
    from starlette.types import Receive, Send

    from cluster.clock import Clock
    from cluster.errors import ServingError
    from gateway.choice import Choice, Piece
    from gateway.detokenizer import TokenBytes
    from gateway.generation import Generation

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
HTTP_OK = 200
MAX_UNREAD = 1 << 20  # tokens and log-probabilities; each takes some 120 bytes
MAX_WRITE_BYTES = 1 << 20  # before others have a turn: of prompts that are echoed, say


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

    def keep_alive(self) -> bytes:
        """What says nothing, but that the stream goes on."""


def _frames(generation: Generation, token_bytes: TokenBytes) -> AnswerFrames:
    if generation.request.route is Route.RESPONSES:
        return ResponsesFrames(generation)
    if generation.request.route is Route.MESSAGES:
        return MessagesFrames(generation)
    return Frames(generation, token_bytes)


class StreamWriter:
    """Writes one stream; see the module. `run` returns when the answer is complete; it raises
    `ClientStalled`."""

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
            async with in_flight(receive, self._generation):
                await self._write_all()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._is_stalled or (task is not None and task.uncancel() > 0):
                raise
            raise ClientStalled from None
        finally:
            ticking.cancel()

    async def _write_all(self) -> None:
        generation = self._generation
        while not generation.is_finished:
            await generation.wait()
            if generation.error is None:
                await self._write_new()
            await asyncio.sleep(0)  # a client that reads at once is no reason to go on at once
        if generation.error is not None and not generation.has_disconnected:
            await self._write_error()

    async def _write_new(self) -> None:
        generation = self._generation
        body = b""
        for choice, piece in read_turn(generation):
            body += self._frames.render(choice, piece)
            if len(body) > MAX_WRITE_BYTES:
                generation.wake()
                break
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
            await self._write(self._frames.keep_alive())
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
            is_behind = self._generation.num_unread > MAX_UNREAD
            is_stalled = self._is_writing and (quiet_for >= times.write_timeout or is_behind)
            if is_stalled and writer is not None:
                self._is_stalled = True
                self._generation.abandon()
                writer.cancel()
                return
            if times.keep_alive and not self._is_writing and quiet_for >= times.keep_alive:
                self._wants_keep_alive = True
                self._generation.wake()
