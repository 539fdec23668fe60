"""Calls to Redis that cannot hurt: each is bounded in time, and a dead Redis is left alone.

1. `Store.call` runs one operation under a timeout. A burst of calls takes turns: Redis serves one
   after the other, and so does this process's loop, so that more at once would only be late.
2. Several failures in a row open the breaker: calls are refused at once, without waiting.
3. After a pause one call is let through as a probe. Its success closes the breaker, its
   failure starts the next, longer pause.
4. A call with a short timeout of its own that ran out goes on alone, up to the store's timeout: its
   late reply is read and thrown away, and its connection serves the next call. Else every late
   reply, and every slow handshake, would cost a connection, and the next call the time for
   another. Beyond `MAX_LATE` of them it ends like any other. Such a timeout is counted in turns of
   the loop: while a busy one does not read them, replies are not late.

Every failure is a `StoreUnavailable`; what to do without the answer is the caller's decision.
A call that is cancelled, or ends with the store's timeout, drops its connection, so that its late
reply is never taken for the reply to another call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, TypeVar

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ReadOnlyError, RedisError

from cluster import clock as clocks
from cluster.errors import ConfigError, InternalError
from cluster.logging import redact
from cluster.metrics import StoreMetrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from cluster.clock import Clock

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_TIMEOUT_SECONDS = 1.0
CONNECT_TIMEOUT_SECONDS = 1.0
MAX_LATE = 8  # calls that go on after their time; each has a connection of its own
MAX_AT_ONCE = 4
MAX_WAITING = 128  # for their turn; more are refused
MAX_CONNECTIONS = 32
LOOP_TURNS = 4  # in a timeout; a call of three round trips needs as many


class StoreUnavailable(InternalError):
    """Redis did not answer in time, refused, or was not asked. Never seen by clients."""


class Breaker:
    """Pure. Opens after `threshold` failures in a row; pauses double up to `max_pause_seconds`."""

    def __init__(
        self,
        *,
        threshold: int = 3,
        first_pause_seconds: float = 0.5,
        max_pause_seconds: float = 5.0,
    ) -> None:
        self._threshold = threshold
        self._first_pause = first_pause_seconds
        self._max_pause = max_pause_seconds
        self._num_failures = 0
        self._pause = first_pause_seconds
        self._closed_until: float | None = None
        self._is_probing = False

    @property
    def is_open(self) -> bool:
        return self._closed_until is not None

    def allows(self, now: float) -> bool:
        """True when a call may be made; while open, true once per pause: that call is the probe."""
        if self._closed_until is None:
            return True
        if self._is_probing or now < self._closed_until:
            return False
        self._is_probing = True
        return True

    def succeeded(self) -> None:
        self._num_failures = 0
        self._pause = self._first_pause
        self._closed_until = None
        self._is_probing = False

    def failed(self, now: float) -> None:
        self._num_failures += 1
        if self._num_failures < self._threshold:
            return
        if self._closed_until is not None and self._is_probing:
            self._pause = min(self._pause * 2, self._max_pause)
        self._closed_until = now + self._pause
        self._is_probing = False

    def abandoned(self) -> None:
        """A call was cancelled: it says nothing about Redis, another may probe."""
        self._is_probing = False


class Store:
    """One connection pool and one breaker. `name` labels metrics and log lines.

    Registry and prefix index have a store each: a slow index must not blind the registry.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        metrics: StoreMetrics | None = None,
        breaker: Breaker | None = None,
        clock: Clock = clocks.monotonic,
    ) -> None:
        self.name = name
        self.metrics = StoreMetrics() if metrics is None else metrics
        self._timeout_seconds = timeout_seconds
        self._breaker = Breaker() if breaker is None else breaker
        self._clock = clock
        self._client = _connect_lazily(url)
        self._where = redact(url)
        self._late: set[asyncio.Task[Any]] = set()
        self._turns = asyncio.Semaphore(MAX_AT_ONCE)
        self._num_waiting = 0
        self.metrics.is_up.labels(name).set(1)

    @property
    def is_up(self) -> bool:
        return not self._breaker.is_open

    async def call(
        self,
        operation: Callable[[aioredis.Redis], Awaitable[T]],
        *,
        timeout_seconds: float | None = None,
    ) -> T:
        """The result of `operation` on the client, or `StoreUnavailable` within the timeout, which
        begins with its turn."""
        async with self._turn():
            return await self._call(operation, timeout_seconds)

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self._num_waiting == MAX_WAITING:
            self._count("refused")
            raise StoreUnavailable("Too many calls wait for the store.")
        self._num_waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self._num_waiting -= 1
        try:
            yield
        finally:
            self._turns.release()

    async def _call(
        self, operation: Callable[[aioredis.Redis], Awaitable[T]], timeout_seconds: float | None
    ) -> T:
        if not self._breaker.allows(self._clock()):
            self._count("refused")
            raise StoreUnavailable("The store is not answering; it is tried again soon.")
        limit = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        try:
            if limit < self._timeout_seconds:
                result = await self._early(operation, limit)
            else:
                result = await self._run(operation, limit)
        except TimeoutError as error:
            self._failed("timeout", f"no answer within {limit} s")
            raise StoreUnavailable("The store did not answer in time.") from error
        except (RedisError, OSError) as error:
            if isinstance(error, ReadOnlyError):  # it has become a replica: look for the master
                await self._client.connection_pool.disconnect(inuse_connections=False)
            self._failed("error", str(error).rstrip(".") or type(error).__name__)
            raise StoreUnavailable("The store refused or dropped a call.") from error
        except asyncio.CancelledError:
            self._breaker.abandoned()
            raise
        except Exception as error:  # a reply of another kind, and what read it broke over it
            self._failed("error", f"its reply makes no sense: {type(error).__name__}")
            raise StoreUnavailable("The store answered nonsense.") from error
        self._succeeded()
        return result

    async def close(self) -> None:
        for task in self._late:
            task.cancel()
        await asyncio.gather(*self._late, return_exceptions=True)
        await self._client.aclose()

    async def _run(
        self, operation: Callable[[aioredis.Redis], Awaitable[T]], limit_seconds: float
    ) -> T:
        async with asyncio.timeout(limit_seconds):
            return await operation(self._client)

    async def _early(
        self, operation: Callable[[aioredis.Redis], Awaitable[T]], limit_seconds: float
    ) -> T:
        """`TimeoutError` after `limit_seconds`, while the operation goes on."""
        running = asyncio.create_task(self._run(operation, self._timeout_seconds))
        try:
            for _ in range(LOOP_TURNS):
                await asyncio.wait({running}, timeout=limit_seconds / LOOP_TURNS)
                if running.done():
                    return running.result()
        except asyncio.CancelledError:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            raise
        if len(self._late) >= MAX_LATE:
            running.cancel()
        self._late.add(running)
        running.add_done_callback(self._late_ended)
        raise TimeoutError

    def _late_ended(self, task: asyncio.Task[Any]) -> None:
        """Its failure is no news: it was counted, and the next call meets it too."""
        self._late.discard(task)
        if not task.cancelled():
            task.exception()

    def _succeeded(self) -> None:
        if self._breaker.is_open:
            logger.info("%s: Redis answers again", self.name)
        self._breaker.succeeded()
        self._count("ok")
        self.metrics.is_up.labels(self.name).set(1)

    def _failed(self, outcome: str, cause: str) -> None:
        was_open = self._breaker.is_open
        self._breaker.failed(self._clock())
        self._count(outcome)
        if self._breaker.is_open and not was_open:
            logger.warning(
                "%s: Redis at %s does not answer (%s); it is asked again and again",
                *(self.name, self._where, cause),
            )
            self.metrics.is_up.labels(self.name).set(0)

    def _count(self, outcome: str) -> None:
        self.metrics.calls.labels(self.name, outcome).inc()


def check_redis_url(url: str) -> None:
    """Raises `ConfigError` with param "redis_url" when no connection could be made of the URL."""
    client = _connect_lazily(url)
    try:
        # It takes what the URL says of it, or does not.
        client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, RedisError) as error:
        raise _not_a_redis_url() from error


def _not_a_redis_url() -> ConfigError:
    return ConfigError("is not a Redis URL", param="redis_url")


def _connect_lazily(url: str) -> aioredis.Redis:
    scheme = url.partition(":")[0]
    if scheme not in ("redis", "rediss", "unix"):
        raise ConfigError("must start with redis://, rediss:// or unix://", param="redis_url")
    network = {} if scheme == "unix" else {"socket_keepalive": True}
    try:
        return aioredis.Redis.from_url(
            url,
            protocol=2,
            max_connections=MAX_CONNECTIONS,
            # `call` bounds the time. The client's own bound uses `asyncio.wait_for`, which before
            # Python 3.12 may swallow a cancellation: a poller would then never end.
            socket_timeout=None,
            socket_connect_timeout=CONNECT_TIMEOUT_SECONDS,
            **network,
            retry=Retry(NoBackoff(), 0),  # the breaker decides when to try again
        )
    except ValueError as error:
        raise _not_a_redis_url() from error
