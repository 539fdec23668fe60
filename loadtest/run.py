"""One measurement, from options to a result.

1. Ask the server for its model when none is named.
2. Plan everything: prompts, lengths, arrivals. No randomness is drawn after this.
3. Warm up, with prompts of their own.
4. Start the clock, send on schedule, wait for all answers, stop the clock. Or until it is cut: then
   what runs is cancelled, and only what had ended counts.
5. Summarise.
"""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import contextmanager, nullcontext
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from loadtest.client import BenchClient
from loadtest.interrupt import interrupts_set, unless_cut
from loadtest.metadata import collect_metadata
from loadtest.result import BenchResult, Cut
from loadtest.schedule import dispatch, plan_arrivals
from loadtest.statistics import summarise
from loadtest.workload import PlainVocabulary, TokenizerVocabulary, load_tokenizer, plan_requests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from loadtest.config import BenchConfig
    from loadtest.record import RequestRecord
    from loadtest.workload import PlannedRequest


def run(config: BenchConfig) -> BenchResult:
    """Measure, in an event loop of its own. Raises `ConfigError` and `ServerNotReady`."""
    return asyncio.run(measure(config))


def run_until_interrupted(config: BenchConfig) -> BenchResult:
    """The same for a person: the first Ctrl-C cuts it, and the result says so."""
    return asyncio.run(measure(config, are_interrupts_cuts=True))


async def measure(
    config: BenchConfig, cut: asyncio.Event | None = None, *, are_interrupts_cuts: bool = False
) -> BenchResult:
    """`cut`, once set, ends it early."""
    cut = cut or asyncio.Event()
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    vocabulary = tokenizer or PlainVocabulary(config.random_vocab_size)
    clock = _Stopwatch()
    async with BenchClient(config, clock, count_tokens=_counter(tokenizer)) as client:
        model = config.model or await client.first_model()
        requests, warmups = plan_requests(config, model, vocabulary)
        arrivals = plan_arrivals(
            len(requests), config.requests_per_second, config.gap_shape, config.seed
        )
        await _Sending(client, warmups, config.max_concurrency).all([0.0] * len(warmups), clock)
        started = datetime.now().astimezone()
        interrupts = interrupts_set(cut) if are_interrupts_cuts else nullcontext()
        with _quiet_collector(), _progress(len(requests)) as on_done, interrupts:
            sending = _Sending(client, requests, config.max_concurrency, on_done)
            cpu_before = time.process_time()
            clock.restart()
            await unless_cut(sending.all(arrivals, clock), cut)
            duration = clock()
            cpu = time.process_time() - cpu_before
    return BenchResult(
        config=config,
        model=model,
        started=started,
        summary=summarise(
            sending.records,
            duration,
            percentiles=config.percentiles,
            slo_seconds=config.slo_seconds,
        ),
        records=sending.records,
        client_cpu=cpu / duration,
        metadata=collect_metadata(),
        cut=sending.left_undone(),
    )


class _Sending:
    """Requests on their way, and the records of those that have ended."""

    def __init__(
        self,
        client: BenchClient,
        requests: Sequence[PlannedRequest],
        max_concurrency: int | None,
        on_done: Callable[[], None] = lambda: None,
    ) -> None:
        self._client = client
        self._requests = requests
        self._limit = asyncio.Semaphore(max_concurrency or len(requests) or 1)
        self._on_done = on_done
        self._num_sent = 0
        self._ended: list[RequestRecord] = []

    @property
    def records(self) -> list[RequestRecord]:
        """In the order of the requests."""
        return sorted(self._ended, key=lambda record: record.index)

    async def all(self, arrivals: Sequence[float], clock: _Stopwatch) -> None:
        """Until the last answer has ended. Cancelled, it cancels what is on its way."""
        async with asyncio.TaskGroup() as on_their_way:

            async def start_one(index: int) -> None:
                await self._limit.acquire()
                self._num_sent += 1
                on_their_way.create_task(self._exchange(index, arrivals[index]))

            await dispatch(arrivals, start_one, clock=clock, sleep=asyncio.sleep)

    def left_undone(self) -> Cut | None:
        num_running = self._num_sent - len(self._ended)
        num_unsent = len(self._requests) - self._num_sent
        return Cut(num_running, num_unsent) if num_running or num_unsent else None

    async def _exchange(self, index: int, planned: float) -> None:
        try:
            record = await self._client.send(self._requests[index], planned)
        finally:
            self._limit.release()
        self._ended.append(record)
        self._on_done()


class _Stopwatch:
    """A clock that reads 0 when the measurement starts."""

    def __init__(self) -> None:
        self._zero = time.perf_counter()

    def restart(self) -> None:
        self._zero = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._zero


def _counter(tokenizer: TokenizerVocabulary | None) -> Callable[[str], int] | None:
    return None if tokenizer is None else tokenizer.count


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """No garbage collection pauses from what was planned; cyclic garbage is still found."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as bar:
        task = bar.add_task("requests", total=total)
        yield lambda: bar.advance(task)
