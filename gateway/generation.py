"""One request in flight: its choices, and whoever writes its answer.

Life of a generation
    1. `Gateway.begin` admits the request and submits its sequences.
    2. Deltas wake the writer: the first token at once, later ones when a choice has gathered
       `stream_interval` of them, the ending at once.
    3. The writer takes the pieces of all choices and waits again, until all have ended.
    4. `close` gives everything back, whatever happened: what still runs is cancelled on both
       nodes, admission gets its room, the outcome is counted and logged.

The first error ends the whole request. A client that leaves is such an error, too (`leave`).
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING

from cluster.errors import Cancelled, ServingError
from gateway.choice import Choice
from gateway.http_errors import as_serving_error, status_of
from gateway.lost_clients import CLIENT_GONE, ClientStalled
from gateway.request_book import EndedRequest
from gateway.turns import tokens_at_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster.clock import Clock
    from cluster.request import TokenDelta
    from gateway.admission import Admitted
    from gateway.dispatch import Dispatcher
    from gateway.measures import Measures
    from gateway.request import Request
    from gateway.request_book import RequestBook
    from gateway.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
HTTP_OK = 200
HTTP_SERVER_ERROR = 500
# The line has the request's id from its context.
_LOGGED = [each.name for each in fields(EndedRequest) if each.name not in ("request_id", "param")]


def _reading_interval(request: Request, stream_interval: int) -> int:
    """How many tokens of a choice gather before they are read."""
    if request.stream.is_stream:
        return stream_interval
    # A stop string must end the work when it appears; the rest must not gather until the end.
    return 1 if request.text.stops else tokens_at_once(request)


class SequenceRun:
    """The dispatcher's listener for one choice. Instants are the clock's."""

    __slots__ = (
        "_generation",
        "attempts",
        "choice",
        "first_at",
        "has_ended",
        "last_at",
        "sequence_id",
    )

    def __init__(self, generation: Generation, choice: Choice, sequence_id: str) -> None:
        self._generation = generation
        self.choice = choice
        self.sequence_id = sequence_id
        self.attempts: list[str] = []  # the nodes of each
        self.first_at: float | None = None
        self.last_at = 0.0
        self.has_ended = False

    def placed(self, nodes: str) -> None:
        self.attempts.append(nodes)

    def deliver(self, delta: TokenDelta, now: float) -> None:
        self.choice.deliver(delta)
        is_last = delta.finish_reason is not None or delta.error is not None
        if is_last:
            self.has_ended = True
        self._generation.on_delta(self, delta, now, is_last=is_last)


class Generation:
    """See the module. `arrived_at` is when the request's first byte was read."""

    def __init__(
        self,
        request: Request,
        *,
        tokenizer: Tokenizer,
        dispatcher: Dispatcher,
        admitted: Admitted,
        measures: Measures,
        book: RequestBook,
        stream_interval: int,
        arrived_at: float,
        clock: Clock,
        new_id: Callable[[], str],
    ) -> None:
        self.request = request
        self.measures = measures
        self.arrived_at = arrived_at
        self.error: ServingError | None = None
        self.has_disconnected = False
        self._dispatcher = dispatcher
        self._book = book
        self._admitted = admitted
        self._interval = _reading_interval(request, stream_interval)
        self._clock = clock
        self._waiter: asyncio.Future[None] | None = None
        self._is_due = False
        self._is_closed = False
        keeps_ids = request.wants_logprobs or request.return_token_ids
        self._runs = [
            SequenceRun(self, Choice(index, tokenizer, request.text, keeps_ids=keeps_ids), new_id())
            for index in range(request.num_sequences)
        ]
        self.choices = [run.choice for run in self._runs]
        book.began(self)

    @property
    def runs(self) -> list[SequenceRun]:
        return self._runs

    @property
    def is_finished(self) -> bool:
        return self.error is not None or all(choice.is_finished for choice in self.choices)

    @property
    def num_unread(self) -> int:
        """Tokens that have come and were not read yet, and log-probabilities with them."""
        num_tokens = sum(choice.num_unread_tokens for choice in self.choices)
        return num_tokens * (1 + (self.request.sampling[0].num_logprobs or 0))

    @property
    def first_at(self) -> float | None:
        """When the first token of any choice was there."""
        return min((run.first_at for run in self._runs if run.first_at is not None), default=None)

    # ---- from the dispatcher -------------------------------------------------------------

    def on_delta(self, run: SequenceRun, delta: TokenDelta, now: float, *, is_last: bool) -> None:
        is_first = False
        if delta.token_ids:
            is_first = run.first_at is None
            if is_first:
                self._on_first_token(run, now)
            else:
                self.measures.gap(now - run.last_at)
            run.last_at = now
        if is_first or is_last or run.choice.num_unread_tokens >= self._interval:
            self.wake()

    def _on_first_token(self, run: SequenceRun, now: float) -> None:
        run.first_at = now
        prompt = self.request.prompts[run.choice.index // self.request.n]
        self._admitted.prefilled(len(prompt.token_ids), now)

    # ---- for the writer ------------------------------------------------------------------

    def wake(self) -> None:
        self._is_due = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Until something is worth writing. One writer at a time."""
        if not self._is_due:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        self._is_due = False

    def settle(self, choice: Choice) -> None:
        """To be called after `take`: a choice that ended early stops its nodes; errors spread."""
        if choice.error is not None:
            self.fail(choice.error)
            return
        run = self._runs[choice.index]
        if choice.is_finished and not run.has_ended:
            run.has_ended = True
            self._dispatcher.cancel(run.sequence_id)

    def first_token_sent(self, at: float | None) -> None:
        if at is not None:
            self.measures.time_to_first_token.observe(at - self.arrived_at)

    def leave(self) -> None:
        """The client has gone: all of it ends now. Who has its answer may go."""
        if not self.is_finished:
            self.abandon()

    def abandon(self) -> None:
        """The client takes no more of its answer, and has not got all of it, finished or not."""
        if self.error is None and not self._is_closed:
            self.has_disconnected = True
            self.fail(Cancelled("The client closed the connection.", reason=CLIENT_GONE))

    def fail(self, error: ServingError) -> None:
        if self.error is None:
            self.error = error
        self._cancel_running()
        self.wake()

    @contextmanager
    def failing(self) -> Iterator[None]:
        """With what breaks in here, if only by a bug. It is raised as a typed error."""
        try:
            yield
        except ClientStalled:
            raise
        except Exception as error:
            known = as_serving_error(error)
            self.fail(known)
            if known is error:
                raise
            raise known from error

    def close(self) -> None:
        """Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._cancel_running()
        self._admitted.release()
        self._count()

    def _cancel_running(self) -> None:
        for run in self._runs:
            if not run.has_ended:
                run.has_ended = True
                self._dispatcher.cancel(run.sequence_id)

    # ---- the outcome ---------------------------------------------------------------------

    @property
    def num_prompt_tokens(self) -> int:
        return self.request.num_prompt_tokens

    @property
    def num_output_tokens(self) -> int:
        return sum(choice.num_output_tokens for choice in self.choices)

    @property
    def num_thought_tokens(self) -> int:
        return sum(choice.num_thought_tokens for choice in self.choices)

    @property
    def num_cached_tokens(self) -> int:
        """Of the first choice of each prompt: its siblings find what it computed."""
        return sum(choice.num_cached_tokens or 0 for choice in self.choices[:: self.request.n])

    @property
    def status(self) -> int:
        """That its client is told; of a stream that broke, the status of its error."""
        return HTTP_OK if self.error is None else status_of(self.error, self.request.message_id)

    def _count(self) -> None:
        measures = self.measures
        now = self._clock()
        measures.num_prompt_tokens += self.num_prompt_tokens
        measures.num_cached_tokens += self.num_cached_tokens
        measures.num_generated_tokens += self.num_output_tokens
        measures.prompt_tokens.observe(self.num_prompt_tokens)
        measures.generation_tokens.observe(self.num_output_tokens)
        if self.error is None:
            measures.request_latency.observe(now - self.arrived_at)
        for run in self._runs:
            self._count_sequence(run)
        how = self._how_it_ended(now)
        self._book.ended(self, how)
        level = logging.WARNING if self.status >= HTTP_SERVER_ERROR else logging.INFO
        logger.log(level, "request ended", extra={name: getattr(how, name) for name in _LOGGED})

    def _count_sequence(self, run: SequenceRun) -> None:
        reason = run.choice.finish_reason
        outcome = "abort" if self.has_disconnected else "error"
        self.measures.endings[outcome if reason is None else reason.value] += 1
        num_tokens = run.choice.num_output_tokens
        if run.first_at is not None and num_tokens > 1:
            seconds = (run.last_at - run.first_at) / (num_tokens - 1)
            self.measures.output_token_time(seconds)

    @property
    def num_retries(self) -> int:
        return sum(max(0, len(run.attempts) - 1) for run in self._runs)

    def _how_it_ended(self, now: float) -> EndedRequest:
        request, error, first_at = self.request, self.error, self.first_at
        nodes = [each for run in self._runs for each in run.attempts]
        reasons = [choice.finish_reason for choice in self.choices if error is None]
        return EndedRequest(
            request_id=request.request_id,
            route=request.route.value,
            status=self.status,
            error=None if error is None else error.code,
            reason=None if error is None else error.reason,
            param=None if error is None else error.param,
            finish=_listed([reason.value for reason in reasons if reason is not None]),
            model=request.model,
            nodes=_listed(nodes),
            num_sequences=request.num_sequences,
            num_retries=self.num_retries,
            prompt_tokens=self.num_prompt_tokens,
            cached_tokens=self.num_cached_tokens,
            output_tokens=self.num_output_tokens,
            ttft_ms=None if first_at is None else round((first_at - self.arrived_at) * 1e3, 2),
            duration_ms=round((now - self.arrived_at) * 1e3, 2),
        )


def _listed(names: list[str]) -> str | None:
    """Each once."""
    return ", ".join(dict.fromkeys(names)) or None
