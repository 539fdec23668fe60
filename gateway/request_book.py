"""Which requests are in flight, and how the last ones ended: what an operator asks a minute later.

1. `began`: a request was taken in. Its sequences are found by their streams' ids.
2. `ended`: it has its answer, or its error; `refused`: it was not taken in at all.
3. `last` shows them, the latest first.

The last `CAPACITY` are kept of each class of status (200, 400, 500), and of those whose clients
left, so that many that go well, or that nobody waits for, or a client that is refused again and
again, push out none that failed. A kept request is its
figures and names: nothing of prompt or answer, nor messages of errors, which may quote them.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gateway.lost_clients import CLIENT_GONE

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.errors import ServingError
    from gateway.generation import Generation

CAPACITY = 500
MAX_NAME_CHARS = 200
HTTP_BAD_REQUEST = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedRequest:
    """`status`: that of the answer; of a stream that broke, the status of its error. `finish` of
    one that went well: the reasons of its choices. `error`, `reason` and `param` are those of the
    client's error. `nodes`: the pairs that worked on it, in turn."""

    request_id: str
    route: str
    status: int
    error: str | None = None
    reason: str | None = None
    param: str | None = None
    finish: str | None = None
    model: str | None = None
    nodes: str | None = None
    num_sequences: int = 0
    num_retries: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    ttft_ms: float | None = None
    duration_ms: float = 0.0

    @property
    def has_failed(self) -> bool:
        """Its client got an error."""
        return self.status >= HTTP_BAD_REQUEST and self.reason != CLIENT_GONE


@dataclass(frozen=True, slots=True)
class _Kept:
    number: int
    at: float  # Unix seconds
    request: EndedRequest


class RequestBook:
    def __init__(
        self, capacity: int = CAPACITY, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._capacity = capacity
        self._wall_clock = wall_clock
        self._numbers = itertools.count()
        self._generations: dict[str, Generation] = {}  # by the ids of their streams
        # By class of status and whether they failed, the latest last.
        self._kept: dict[tuple[int, bool], deque[_Kept]] = {}

    def began(self, generation: Generation) -> None:
        self._generations |= dict.fromkeys(_streams_of(generation), generation)

    def of_stream(self, stream_id: str) -> Generation | None:
        return self._generations.get(stream_id)

    def ended(self, generation: Generation, how: EndedRequest) -> None:
        for stream_id in _streams_of(generation):
            self._generations.pop(stream_id, None)
        self.keep(how)

    def refused(
        self, request_id: str, route: str, status: int, error: ServingError, seconds: float = 0.0
    ) -> None:
        """`status`: that its client is told. `seconds`: since its arrival."""
        self.keep(
            EndedRequest(
                request_id=request_id,
                route=route,
                status=status,
                error=error.code,
                reason=error.reason,
                param=error.param,
                duration_ms=round(seconds * 1e3, 2),
            )
        )

    def keep(self, request: EndedRequest) -> None:
        if _is_long(request.model) or _is_long(request.param):
            request = replace(request, model=_short(request.model), param=_short(request.param))
        outcome = request.status // 100, request.has_failed
        kept = self._kept.setdefault(outcome, deque(maxlen=self._capacity))
        kept.append(_Kept(next(self._numbers), self._wall_clock(), request))

    def last(
        self,
        count: int,
        *,
        failed_only: bool = False,
        is_asked_for: Callable[[EndedRequest], bool] = lambda _: True,
    ) -> list[tuple[float, EndedRequest]]:
        """The latest `count` of those asked for, each with when it ended, in Unix seconds."""
        latest_first = heapq.merge(
            *(reversed(kept) for kept in self._kept.values()), key=lambda kept: -kept.number
        )
        found = (
            (kept.at, kept.request)
            for kept in latest_first
            if is_asked_for(kept.request) and (kept.request.has_failed or not failed_only)
        )
        return list(itertools.islice(found, count))


def _is_long(name: str | None) -> bool:
    """A client may choose it, at any length."""
    return name is not None and len(name) > MAX_NAME_CHARS


def _short(name: str | None) -> str | None:
    return None if name is None else name[:MAX_NAME_CHARS]


def _streams_of(generation: Generation) -> list[str]:
    return [run.sequence_id for run in generation.runs]
