"""The parts of one gateway, and what they do together: take a request in.

1. `model_for` and `max_model_len` tell routes what a request may ask for.
2. `begin` admits a valid request, asks where its prefix is cached, and submits its sequences.
   From then on the `Generation` owns what it took; whoever writes the answer closes it.
"""

from __future__ import annotations

import itertools
import secrets
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from cluster.errors import ModelNotFound, NodeUnavailable, Overloaded, ServingError
from gateway.generation import Generation
from gateway.http_errors import log_refusal, status_of
from gateway.request_book import MAX_NAME_CHARS
from gateway.streaming import StreamTimes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cluster.clock import Clock
    from gateway.admission import Admission
    from gateway.config import GatewayConfig
    from gateway.dispatch import Dispatcher
    from gateway.measures import Measures
    from gateway.nodes import Nodes
    from gateway.policy import Policy, PolicyHolder
    from gateway.prefix_lookup import PrefixLookup
    from gateway.request import Request
    from gateway.request_book import RequestBook
    from gateway.tokenizer import Tokenizer
    from gateway.validation import Validator

_RETRY_SECONDS = 2.0


class Gateway:
    def __init__(
        self,
        config: GatewayConfig,
        *,
        tokenizer: Tokenizer,
        validator: Validator,
        nodes: Nodes,
        dispatcher: Dispatcher,
        admission: Admission,
        lookup: PrefixLookup,
        policy: PolicyHolder,
        measures: Measures,
        book: RequestBook,
        clock: Clock,
        started_at: int,
    ) -> None:
        """`started_at` in Unix seconds: what models say of when they were made."""
        self.config = config
        self.tokenizer = tokenizer
        self.validator = validator
        self.nodes = nodes
        self.dispatcher = dispatcher
        self.admission = admission
        self.policy = policy
        self.measures = measures
        self.book = book
        self.clock = clock
        self.started_at = started_at
        self.times = StreamTimes(
            keep_alive=config.sse_keep_alive_interval, write_timeout=config.write_timeout
        )
        self._lookup = lookup
        self._names: Sequence[str] = config.model_names
        self._boot = secrets.token_hex(6)
        self._numbers = itertools.count()

    @property
    def model_names(self) -> list[str]:
        """Those that are names; a pattern is served, not listed."""
        return [name for name in self._names if "*" not in name] or [self._names[0]]

    @property
    def is_ready(self) -> bool:
        """True when a request that came now would be taken by some pair."""
        return self.why_not_ready() is None

    def why_not_ready(self) -> str | None:
        if self.admission.is_closed:
            return "this gateway is shutting down"
        return self.nodes.what_is_missing()

    def model_for(self, asked: str | None) -> str:
        """The name the answer shows. Raises `ModelNotFound`."""
        if asked is None:
            return self.model_names[0]
        is_short = len(asked) <= MAX_NAME_CHARS  # each event of a stream repeats it
        if any(asked == name or (is_short and fnmatchcase(asked, name)) for name in self._names):
            return asked
        served = ", ".join(repr(name) for name in self._names)
        raise ModelNotFound(
            f"The model {asked[:200]!r} does not exist; this server has {served}.", param="model"
        )

    def max_model_len(self) -> int:
        """Longest prompt plus output, in tokens. Raises while no node is there to say."""
        length = self.nodes.max_model_len()
        if length is None:
            raise NodeUnavailable(
                "No node is connected.", reason="no_pair", retry_after_seconds=_RETRY_SECONDS
            )
        return length

    def check_room(self) -> None:
        """Before anything is done for a request. Raises the typed refusal."""
        with self._rejections_counted():
            self.admission.check()

    @contextmanager
    def _rejections_counted(self) -> Iterator[None]:
        try:
            yield
        except Overloaded as error:
            self.measures.rejections[error.reason or "overloaded"] += 1
            raise

    async def begin(self, request: Request, *, arrived_at: float) -> Generation:
        """Raises the typed refusal; nothing of the request is left behind then."""
        num_tokens = request.num_prompt_tokens * request.n
        policy = self.policy.current.for_request(request.kv_load_failure_policy)
        try:
            with self._rejections_counted():
                admitted = self.admission.admit(request.num_sequences, num_tokens)
        except ServingError as error:
            route, status = request.route.value, status_of(error, request.message_id)
            seconds = self.clock() - arrived_at
            self.book.refused(request.request_id, route, status, error, seconds)
            log_refusal(error, route, status)
            raise
        generation = Generation(
            request,
            tokenizer=self.tokenizer,
            dispatcher=self.dispatcher,
            admitted=admitted,
            measures=self.measures,
            book=self.book,
            stream_interval=policy.stream_interval,
            arrived_at=arrived_at,
            clock=self.clock,
            new_id=self._new_id,
        )
        with ExitStack() as undo:
            undo.callback(generation.close)
            with generation.failing():
                await self._submit(generation, policy)
            undo.pop_all()
        return generation

    async def _submit(self, generation: Generation, policy: Policy) -> None:
        """Choices of one prompt are looked up once, and placed one by one."""
        request = generation.request
        cached = {}
        for run in generation.runs:
            index = run.choice.index
            since_arrival = self.clock() - generation.arrived_at
            sequence = request.sequence(index, run.sequence_id, since_arrival)
            if index % request.n == 0:
                cached = dict(await self._lookup.num_cached_tokens(sequence, policy))
            self.dispatcher.submit(sequence, cached, run, policy)
            if generation.error is not None:
                raise generation.error

    def _new_id(self) -> str:
        """Unique among all gateways and restarts."""
        return f"{self._boot}-{next(self._numbers)}"
