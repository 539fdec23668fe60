"""A server whose answers are scripted, on a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from loadtest.config import BenchConfig
from loadtest.run import measure
from tests.loadtest.results import MakeResult, made_result

if TYPE_CHECKING:
    from loadtest.record import RequestRecord
    from loadtest.result import BenchResult

Models = Callable[[web.Request], Awaitable[web.Response]]
Script = Callable[["ScriptedServer", web.Request, dict[str, Any]], Awaitable[Any]]


@dataclass
class ScriptedServer:
    """Answers every completion by `script`, and remembers what it was asked."""

    script: Script
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.paths.append(request.path)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            response: web.StreamResponse = await self.script(self, request, body)
            return response
        finally:
            self.in_flight -= 1

    @staticmethod
    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "scripted"}]})


@asynccontextmanager
async def serving(script: Script, models: Models | None = None) -> AsyncIterator[ScriptedServer]:
    server = ScriptedServer(script)
    app = web.Application()
    app.router.add_post("/v1/completions", server.handle)
    app.router.add_post("/v1/chat/completions", server.handle)
    app.router.add_get("/v1/models", models or server.models)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def text_chunk(text: str, finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]})


def usage_chunk(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> bytes:
    details = {"cached_tokens": cached_tokens}
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return event({"choices": [], "usage": usage | {"prompt_tokens_details": details}})


DONE = b"data: [DONE]\n\n"


async def stream(request: web.Request, *pieces: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for piece in pieces:
        await response.write(piece)
    await response.write_eof()
    return response


async def answer_all_tokens(
    _: ScriptedServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    """One chunk per token asked for, then usage: what a healthy server does."""
    count = body["max_tokens"]
    pieces = [text_chunk(" a") for _ in range(count)]
    prompt_tokens = len(body["prompt"])
    return await stream(
        request, *pieces, text_chunk("", "length"), usage_chunk(prompt_tokens, count), DONE
    )


@pytest.fixture
def wire() -> SimpleNamespace:
    """The pieces a test builds scripts of."""
    return SimpleNamespace(
        serving=serving,
        stream=stream,
        event=event,
        text_chunk=text_chunk,
        usage_chunk=usage_chunk,
        answer_all_tokens=answer_all_tokens,
        done=DONE,
    )


@pytest.fixture
def bench_config() -> Callable[..., BenchConfig]:
    """Options small enough for a test; anything can be set by keyword."""

    def make(**options: Any) -> BenchConfig:
        small: dict[str, Any] = {
            "num_prompts": 3,
            "random_input_len": 5,
            "random_output_len": 4,
            "model": "m",
        }
        return BenchConfig(**(small | options))

    return make


@pytest.fixture
def measured(bench_config: Callable[..., BenchConfig]) -> Callable[..., Any]:
    """Measure a scripted server; gives the result and the server as it was left."""

    def run(script: Script = answer_all_tokens, **options: Any) -> Any:
        async def scenario() -> Any:
            async with serving(script) as server:
                result = await measure(bench_config(base_url=server.url, **options))
            return result, server

        return asyncio.run(scenario())

    return run


@pytest.fixture
def make_result(bench_config: Callable[..., BenchConfig]) -> MakeResult:
    def make(
        records: list[RequestRecord] | None = None, client_cpu: float = 0.1, **options: Any
    ) -> BenchResult:
        return made_result(bench_config(**options), records, client_cpu)

    return make
