"""Drives a UCX worker from the event loop.

1. UCX's file descriptor wakes it: the worker makes progress, futures of requests that are
   complete get done, the descriptor is armed again. Nothing polls while nothing moves.
2. While device memory moves it looks in each round of the loop, for a while: copies between
   GPUs take less time than wake-ups.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from kv_transfer.failures import FailureReason, failure

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25  # a guard against a lost wake-up, not the way progress is made
# What takes longer on a device waits for its peer, not for a copy: the descriptor will tell.
_SPIN_SECONDS = 0.02


class Progress:
    """Drives one worker from the event loop and completes the futures of its requests."""

    def __init__(self, worker: Any, errors: tuple[type[Exception], ...]) -> None:
        """`errors`: what ucxx raises."""
        self._worker = worker
        self._errors = errors
        self._loop = asyncio.get_running_loop()
        self._pending: list[tuple[Any, asyncio.Future[None], Any]] = []
        self._is_scheduled = False
        self._is_stopped = False
        self._spin_until = 0.0  # on the loop's clock
        self._num_on_device = 0
        worker.init_blocking_progress_mode()
        self._loop.add_reader(worker.epoll_file_descriptor, self._run)
        self._timer = self._loop.call_later(_POLL_SECONDS, self._poll)

    def watch(self, request: Any, keep: Any, *, on_device: bool) -> asyncio.Future[None]:
        """A future for `request`; `keep` (its buffer) lives as long as the request does."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._pending.append((request, future, keep))
        if on_device:
            self._num_on_device += 1
            self._spin_until = self._loop.time() + _SPIN_SECONDS
            future.add_done_callback(self._device_operation_ended)
        self.kick()
        return future

    def _device_operation_ended(self, _: asyncio.Future[None]) -> None:
        self._num_on_device -= 1
        self._spin_until = self._loop.time() + _SPIN_SECONDS

    def kick(self) -> None:
        """Progress soon: something was posted, so an armed descriptor may not tell."""
        if not self._is_scheduled and not self._is_stopped:
            self._is_scheduled = True
            self._loop.call_soon(self._run)

    def stop(self) -> None:
        self._is_stopped = True
        self._timer.cancel()
        self._loop.remove_reader(self._worker.epoll_file_descriptor)
        self._pending.clear()

    def _run(self) -> None:
        self._is_scheduled = False
        if self._is_stopped:
            return
        self._worker.progress()
        self._complete()
        if self._is_spinning() or not self._worker.arm():
            self.kick()

    def _is_spinning(self) -> bool:
        return self._num_on_device > 0 and self._loop.time() < self._spin_until

    def _poll(self) -> None:
        self._timer = self._loop.call_later(_POLL_SECONDS, self._poll)
        self.kick()

    def _complete(self) -> None:
        waiting = []
        for entry in self._pending:
            if entry[0].completed:
                self._resolve(entry[0], entry[1])
            else:
                waiting.append(entry)
        self._pending = waiting

    def _resolve(self, request: Any, future: asyncio.Future[None]) -> None:
        if future.done():
            return
        try:
            request.check_error()
        except self._errors:  # whoever waits hears that the link is gone
            logger.debug("a UCX request ended", exc_info=True)
            future.set_exception(failure(FailureReason.LINK_LOST))
        else:
            future.set_result(None)
