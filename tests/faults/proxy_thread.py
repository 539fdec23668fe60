"""Fault proxies on a thread of their own, for tests that are not asynchronous themselves."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, TypeVar

from tests.faults.proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

T = TypeVar("T")


class LoopThread:
    """An event loop that runs until `close`."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, run there."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Proxies:
    """Any number of proxies. Their `faults_up` and `faults_down` may be set by any thread."""

    def __init__(self, *, seed: int) -> None:
        self._seed = seed
        self._thread = LoopThread("proxies")
        self._proxies: list[FaultProxy] = []

    def open(
        self, host: str, port: int, *, listen: tuple[str, int] = ("127.0.0.1", 0)
    ) -> FaultProxy:
        """A proxy to `host` and `port`, listening."""
        proxy = FaultProxy(host, port, seed=self._seed + len(self._proxies), listen=listen)
        self._thread.run(proxy.start())
        self._proxies.append(proxy)
        return proxy

    def heal(self) -> None:
        for proxy in self._proxies:
            proxy.heal()

    def close(self) -> None:
        self.heal()
        for proxy in self._proxies:
            self._thread.run(proxy.close())
        self._thread.close()
