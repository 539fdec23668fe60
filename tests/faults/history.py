"""What clients saw and what was done to the cluster, in order: the record that `checker` judges.

Kinds of events of one request: `sent`; `tokens`; then one of the endings `finished` (with its
finish_reason), `failed` (an error event inside the stream) and `refused` (an HTTP error); `usage`
for what the gateway has counted; `done` for the line `[DONE]`. `left` says that the client went
away, `unreachable` that nobody took its connection, `broken` that its connection broke, `hung` that
it had no end long after its deadline.

Events of no request are `fault` (what the nemesis did), `server` (what became of a process), and
what the witnesses in the nodes saw (`witness`): `held` and `freed` for blocks of a request on a
node, `contradiction` for an invariant that was broken there.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

ENDINGS = frozenset({"finished", "failed", "refused"})
LAST = ENDINGS | {"left", "broken", "hung"}  # one of these follows each `sent`
NO_REQUEST = -1
COMES_WITHIN_SECONDS = 120.0  # a guard: the requests themselves have deadlines


@dataclass(frozen=True, slots=True)
class Usage:
    """In tokens, as clients are told."""

    prompt: int
    completion: int
    total: int
    cached: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request gets when nothing disturbs it. How much of its prompt is cached is luck."""

    token_ids: tuple[int, ...]
    finish_reason: str
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Event:
    request: int
    kind: str
    at: float  # monotonic seconds
    token_ids: tuple[int, ...] = ()
    detail: str = ""  # finish_reason, error code, or what was done to whom
    usage: Usage | None = None


@dataclass
class History:
    """Events of all requests of a row. Any thread may record."""

    events: list[Event] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    num_tokens: int = 0
    num_ended: int = 0

    def record(
        self,
        request: int,
        kind: str,
        *,
        token_ids: Sequence[int] = (),
        detail: str = "",
        usage: Usage | None = None,
    ) -> None:
        self.add(Event(request, kind, time.monotonic(), tuple(token_ids), detail, usage))

    def add(self, event: Event) -> None:
        with self.changed:
            self.events.append(event)
            self.num_tokens += len(event.token_ids)
            self.num_ended += event.kind in LAST
            self.changed.notify_all()

    def by_request(self) -> dict[int, list[Event]]:
        """The events of each request, in order."""
        found: dict[int, list[Event]] = {}
        for event in self.events:
            if event.request != NO_REQUEST:
                found.setdefault(event.request, []).append(event)
        return found

    def of(self, request: int) -> list[Event]:
        return [event for event in self.events if event.request == request]

    def tokens_of(self, request: int) -> tuple[int, ...]:
        return tuple(token for event in self.of(request) for token in event.token_ids)

    def answer_of(self, request: int) -> Answer:
        """Raises `ValueError` for one that has not finished, or without its usage."""
        events = self.of(request)
        [finish_reason] = (event.detail for event in events if event.kind == "finished")
        [usage] = (event.usage for event in events if event.usage is not None)
        return Answer(self.tokens_of(request), finish_reason, usage.prompt)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def codes(self) -> set[str]:
        """Of all errors."""
        return {event.detail for event in self.events if event.kind in ("failed", "refused")}

    def erred(self) -> set[int]:
        """Requests that did not get what they asked for."""
        bad = ("failed", "refused", "broken", "hung")
        return {event.request for event in self.events if event.kind in bad}

    def wait_for_tokens(self, count: int) -> None:
        """Until clients have that many tokens in all. Raises `TimeoutError`."""
        self._wait(lambda: self.num_tokens >= count, f"{count} tokens")

    def wait_for_ends(self, count: int) -> None:
        """Until that many requests have ended, however. Raises `TimeoutError`."""
        self._wait(lambda: self.num_ended >= count, f"{count} ends of requests")

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        with self.changed:
            if not self.changed.wait_for(condition, COMES_WITHIN_SECONDS):
                raise TimeoutError(f"{what} did not come")

    def write(self, path: Path) -> None:
        """One JSON object for each event."""
        path.write_text("".join(json.dumps(asdict(event)) + "\n" for event in self.events))


def save_for_row(history: History) -> None:
    """Where such a folder is named, every row leaves its histories there."""
    named = os.environ.get("BATON_FAULT_HISTORIES")
    if named:
        row = os.environ.get("PYTEST_CURRENT_TEST", "row").split("::")[-1].split(" ")[0]
        folder = Path(named)
        folder.mkdir(parents=True, exist_ok=True)
        history.write(folder / f"{row}-{len(list(folder.iterdir()))}.jsonl")


def read_history(lines: Iterable[str]) -> History:
    """What `History.write` wrote."""
    history = History()
    for line in lines:
        entry = json.loads(line)
        usage = None if entry["usage"] is None else Usage(**entry["usage"])
        event = Event(**{**entry, "token_ids": tuple(entry["token_ids"]), "usage": usage})
        history.events.append(event)
        history.num_tokens += len(event.token_ids)
        history.num_ended += event.kind in LAST
    return history
