"""What clients saw, in order: the record that `checker` judges.

Kinds of events of one request: `sent`; `tokens`; then one of the endings `finished` (with its
finish_reason), `failed` (an error event inside the stream) and `refused` (an HTTP error); `done`
for the line `[DONE]`. `left` says that the client went away, `broken` that its connection broke,
`hung` that nothing came for so long that it gave up.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

HANG_SECONDS = 30.0
ENDINGS = frozenset({"finished", "failed", "refused"})


@dataclass(frozen=True, slots=True)
class Event:
    request: int
    kind: str
    at: float  # monotonic seconds
    token_ids: tuple[int, ...] = ()
    detail: str = ""  # finish_reason or error code


@dataclass
class History:
    """Events of all requests of a row. Any thread may record."""

    events: list[Event] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def record(
        self, request: int, kind: str, *, token_ids: Sequence[int] = (), detail: str = ""
    ) -> None:
        event = Event(request, kind, time.monotonic(), tuple(token_ids), detail)
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def of(self, request: int) -> list[Event]:
        return [event for event in self.events if event.request == request]

    @property
    def num_tokens(self) -> int:
        return sum(len(event.token_ids) for event in self.events)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def codes(self) -> set[str]:
        """Of all errors."""
        return {event.detail for event in self.events if event.kind in ("failed", "refused")}

    def wait_for_tokens(self, count: int, seconds: float = 20.0) -> None:
        """Until clients have that many tokens in all. Raises `TimeoutError`."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.num_tokens >= count, seconds):
                raise TimeoutError(f"only {self.num_tokens} tokens came")

    def write(self, path: Path) -> None:
        """One JSON object for each event."""
        path.write_text("".join(json.dumps(asdict(event)) + "\n" for event in self.events))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request of a row. The client leaves once it has `leaves_after` tokens."""

    number: int
    prompt: tuple[int, ...]
    num_tokens: int
    leaves_after: int | None = None


def stream(history: History, url: str, ask: Ask) -> None:
    """Send one request and record what comes, until its end or until the client leaves."""
    body = {
        "model": "pocket",
        "prompt": list(ask.prompt),
        "max_tokens": ask.num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }
    history.record(ask.number, "sent")
    try:
        with (
            httpx.Client(timeout=HANG_SECONDS) as client,
            client.stream("POST", f"{url}/completions", json=body) as response,
        ):
            if response.status_code != httpx.codes.OK:
                response.read()
                history.record(ask.number, "refused", detail=response.json()["error"]["code"])
                return
            _record_lines(history, ask, response.iter_lines())
    except httpx.TimeoutException:
        history.record(ask.number, "hung")
    except httpx.TransportError as error:
        history.record(ask.number, "broken", detail=type(error).__name__)


def _record_lines(history: History, ask: Ask, lines: Iterable[str]) -> None:
    num_tokens = 0
    if ask.leaves_after == 0:
        history.record(ask.number, "left")
        return
    for line in lines:
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            history.record(ask.number, "done")
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            history.record(ask.number, "failed", detail=event["error"]["code"])
            continue
        for choice in event["choices"]:
            if token_ids := choice.get("token_ids"):
                history.record(ask.number, "tokens", token_ids=token_ids)
                num_tokens += len(token_ids)
            if choice["finish_reason"] is not None:
                history.record(ask.number, "finished", detail=choice["finish_reason"])
        if ask.leaves_after is not None and num_tokens >= ask.leaves_after:
            history.record(ask.number, "left")
            return
