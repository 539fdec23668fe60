"""What a receiver does not wait for."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kv_transfer.receiving.errands import Errands
from kv_transfer.receiving.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Awaitable


def test_a_node_hears_of_a_start_in_the_call_that_finds_all_of_it_verified() -> None:
    """Not in a later round of the loop: a client waits for its second token."""

    async def scenario() -> None:
        heard: list[tuple[str, int]] = []
        done: list[Any] = []

        async def run() -> None:
            done.append("started")

        def start(sequence_id: str, first_token_id: int) -> Awaitable[None]:
            heard.append((sequence_id, first_token_id))
            return run()

        transfers = {b"t": SimpleNamespace(began_at=0.0)}
        intake: Any = SimpleNamespace(transfers=transfers, started=lambda *_: ["committed"])
        stats = SimpleNamespace(transfers_done=0, transfer_seconds=0.0)
        agent: Any = SimpleNamespace(stats=stats)
        source: Any = SimpleNamespace(start=start)
        sessions: Any = None
        tasks = Tasks()
        errands = Errands(agent, source, intake, sessions, tasks, done.extend, lambda: 1.0)
        sequence: Any = SimpleNamespace(transfer_id=b"t", sequence_id="s")
        errands.start(sequence, 7)
        assert heard == [("s", 7)]
        assert done == []
        await tasks.ended()
        assert done == ["started", "committed"]

    asyncio.run(scenario())
