"""Sends requests and times their answers. One client, one connection pool, any concurrency.

Life of a request
    1. The body was serialised when it was planned; sending it costs no JSON.
    2. `sent` is stamped, then the POST goes out.
    3. Each piece of the body is stamped when it is read, and given to the `AnswerReader`.
    4. Whatever goes wrong becomes a failure with a class in its record. Nothing raises.
"""

from __future__ import annotations

import asyncio
import json
import os
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urljoin

import aiohttp

from cluster.errors import NodeUnavailable
from cluster.logging import redact
from loadtest.answer import AnswerReader, describe_error
from loadtest.record import RequestFailure, RequestRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.clock import Clock
    from loadtest.config import BenchConfig
    from loadtest.workload import PlannedRequest

_ROUTES = {"openai": "v1/completions", "openai-chat": "v1/chat/completions"}
_MESSAGE_LIMIT = 500
MODELS_SECONDS = 30.0  # for the server to name its model


class ServerNotReady(NodeUnavailable):
    """The server to measure does not answer, or names no model."""


class BenchClient:
    """Use as an async context manager. `count_tokens` is asked when a server sends no usage."""

    def __init__(
        self,
        config: BenchConfig,
        clock: Clock,
        *,
        count_tokens: Callable[[str], int] | None = None,
    ) -> None:
        self._backend = config.backend
        self._base_url = config.server_url + "/"
        self._url = urljoin(self._base_url, _ROUTES[config.backend])
        self._headers = {"Content-Type": "application/json"}
        if config.api_key:
            self._headers["Authorization"] = f"Bearer {config.api_key[0]}"
        self._timeout = aiohttp.ClientTimeout(total=config.request_timeout)
        self._patience = min(config.request_timeout, MODELS_SECONDS)
        self._clock = clock
        self._count_tokens = count_tokens

    async def __aenter__(self) -> BenchClient:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=self._timeout,
            headers=self._headers,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(self, request: PlannedRequest, planned: float) -> RequestRecord:
        record = RequestRecord(
            index=request.index, planned=planned, num_input_tokens=request.num_input_tokens
        )
        record.sent = self._clock()
        try:
            await self._exchange(request, record)
        except TimeoutError:
            record.failure = RequestFailure("timeout", "no answer in time")
        except (aiohttp.ClientError, OSError, ValueError) as error:  # the last of no host's name
            record.failure = RequestFailure(_connection_class(error), str(error)[:_MESSAGE_LIMIT])
        return record

    async def first_model(self) -> str:
        """The first of `/v1/models`. Raises `ServerNotReady`."""
        url = urljoin(self._base_url, "v1/models")
        shown = redact(url)
        try:
            async with asyncio.timeout(self._patience), self._session.get(url) as response:
                response.raise_for_status()
                body = await response.read()
        except TimeoutError as error:
            raise ServerNotReady(f"{shown} did not answer in {self._patience:g} s.") from error
        except aiohttp.ClientResponseError as error:
            hint = "; pass --api-key" if error.status == HTTPStatus.UNAUTHORIZED else ""
            told = f"{error.status} {error.message}".strip()
            raise ServerNotReady(f"{shown} answers {told}{hint}.") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ServerNotReady(f"No server answers at {shown}: {_cause(error)}.") from error
        try:
            return str(json.loads(body)["data"][0]["id"])
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise ServerNotReady(f"{shown} names no model; pass --model.") from error

    async def _exchange(self, request: PlannedRequest, record: RequestRecord) -> None:
        async with self._session.post(self._url, data=request.body) as response:
            if response.status != 200:
                record.failure = _refusal(response.status, await response.read())
                return
            if response.content_type != "text/event-stream":
                record.failure = RequestFailure("not_a_stream", response.content_type)
                return
            await self._read_stream(response, record, request.num_output_tokens)

    async def _read_stream(
        self, response: aiohttp.ClientResponse, record: RequestRecord, num_asked: int
    ) -> None:
        reader = AnswerReader(
            self._backend,
            record,
            keep_text=self._count_tokens is not None,
            num_asked=num_asked,
        )
        clock, stream = self._clock, response.content
        while data := await stream.readany():
            reader.take(data, clock())
            if record.failure is not None:
                return
        reader.finish()
        if record.counted_by == "chunks" and self._count_tokens is not None:
            record.num_output_tokens = self._count_tokens(reader.text)
            record.counted_by = "tokenizer"


def _refusal(status: int, body: bytes) -> RequestFailure:
    """The failure that an answer with an error status is."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict) and "error" in document:
        name, message = describe_error(document["error"])
        return RequestFailure(f"http_{status} {name}", message[:_MESSAGE_LIMIT])
    return RequestFailure(f"http_{status}", body[:_MESSAGE_LIMIT].decode(errors="replace"))


def _cause(error: Exception) -> str:
    """What the system says where it says something: "Connection refused"."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    number = getattr(cause, "errno", None) or 0
    if number > 0:
        return os.strerror(number)
    return str(getattr(cause, "strerror", None) or cause).rstrip(".")


def _connection_class(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return "connection_refused"
    if isinstance(error, (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError, OSError)):
        return "connection_lost"
    return type(error).__name__
