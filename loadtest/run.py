"""One measurement, from options to a result.

1. Ask the server for its model when none is named.
2. Plan everything: prompts, lengths, arrivals. No randomness is drawn after this.
3. Warm up, with prompts of their own.
4. Start the clock, send on schedule, wait for all answers, stop the clock.
5. Summarise.
"""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from loadtest.client import BenchClient
from loadtest.metadata import collect_metadata
from loadtest.report import BenchResult
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


async def measure(config: BenchConfig) -> BenchResult:
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    vocabulary = tokenizer or PlainVocabulary(config.random_vocab_size)
    clock = _Stopwatch()
    async with BenchClient(config, clock, count_tokens=_counter(tokenizer)) as client:
        model = config.model or await client.first_model()
        requests, warmups = plan_requests(config, model, vocabulary)
        arrivals = plan_arrivals(
            len(requests), config.requests_per_second, config.burstiness, config.seed
        )
        await _send_all(client, warmups, [0.0] * len(warmups), config.max_concurrency, clock)
        started = datetime.now().astimezone()
        with _quiet_collector(), _progress(len(requests)) as on_done:
            cpu_before = time.process_time()
            clock.restart()
            records = await _send_all(
                client, requests, arrivals, config.max_concurrency, clock, on_done
            )
            duration = clock()
            cpu = time.process_time() - cpu_before
    summary = summarise(
        records, duration, percentiles=config.percentiles, slo_seconds=config.slo_seconds
    )
    return BenchResult(
        config=config,
        model=model,
        started=started,
        summary=summary,
        records=records,
        client_cpu=cpu / duration,
        metadata=collect_metadata(),
    )


async def _send_all(
    client: BenchClient,
    requests: Sequence[PlannedRequest],
    arrivals: Sequence[float],
    max_concurrency: int | None,
    clock: _Stopwatch,
    on_done: Callable[[], None] = lambda: None,
) -> list[RequestRecord]:
    """Records in the order of `requests`, once the last answer has ended."""
    limit = asyncio.Semaphore(max_concurrency or len(requests) or 1)
    tasks: list[asyncio.Task[RequestRecord]] = []

    async def exchange(index: int) -> RequestRecord:
        try:
            return await client.send(requests[index], arrivals[index])
        finally:
            limit.release()
            on_done()

    async def start_one(index: int) -> None:
        await limit.acquire()
        tasks.append(asyncio.create_task(exchange(index)))

    await dispatch(arrivals, start_one, clock=clock, sleep=asyncio.sleep)
    return await asyncio.gather(*tasks)


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
