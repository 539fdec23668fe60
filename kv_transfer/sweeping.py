"""The timer of a sender or a receiver, on which leases, drains and tombstones hang."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from cluster.isolation import isolated

logger = logging.getLogger(__name__)

MAX_SECONDS = 0.25  # between two sweeps


class Swept(Protocol):
    def sweep(self) -> None:
        """Act on what time alone has changed."""


async def sweep_forever(swept: Swept, lease_seconds: float) -> None:
    interval = min(MAX_SECONDS, lease_seconds / 12)
    while True:
        await asyncio.sleep(interval)
        isolated(swept.sweep, "a sweep broke off", logger)
