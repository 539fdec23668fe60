"""KV transfer over UCX between real processes, which are killed, stopped and restarted."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.node import Incarnation, NodeId, NodeName
from tests.kv_child import OPTIONS, TABLE, data_transport, digest_of
from tests.kv_twins import (
    NUM_BLOCKS,
    Place,
    PrefillSide,
    decode_side,
    make_request,
    prefill_side,
    until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


class Child:
    """A child process and the JSON lines it prints."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self, **wanted: object) -> dict[str, Any]:
        """The next line that has these facts."""
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            while raw := await self.process.stdout.readline():
                facts: dict[str, Any] = json.loads(raw)
                if wanted.items() <= facts.items():
                    return facts
        raise AssertionError("the child ended")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@asynccontextmanager
async def child(*arguments: str) -> AsyncIterator[Child]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.kv_child", *arguments),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "UCX_WARN_UNUSED_ENV_VARS": "n"},
    )
    try:
        yield Child(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()  # to the end of its output, which closes the pipe


@asynccontextmanager
async def decode_child(tls: str) -> AsyncIterator[tuple[Child, Place]]:
    async with child("decode", tls) as decode:
        facts = await decode.line(transport=tls)
        node_id = NodeId(NodeName(facts["name"]), Incarnation(facts["incarnation"]))
        yield decode, Place(facts["address"], node_id)


def prefill_child(tls: str, decode: Place, how: str) -> Any:
    node_id = decode.node_id
    return child("prefill", tls, decode.address, node_id.name, str(node_id.incarnation), how)


async def hand_off(prefill: PrefillSide, decode: Place, process: Child) -> None:
    """One prompt; the bytes in the other process must be ours."""
    request = make_request(32)
    prefill.hand_off(decode, request)
    prefill.compute(request, TABLE)
    prefill.sender.commit(request.sequence_id, 7)
    await until(lambda: prefill.owner.of(request.sequence_id) == ["committed", "free"])
    started = await process.line(what="started", sequence=request.sequence_id)
    assert started["digest"] == digest_of(prefill.pool, TABLE)


@pytest.mark.parametrize(
    ("tls", "transport"), [("tcp", "tcp"), ("sm,tcp", "shm"), ("plain", "tcp")]
)
def test_blocks_cross_processes_over_the_transport_that_is_reported(
    tls: str, transport: str
) -> None:
    async def main() -> None:
        async with (
            decode_child(tls) as (process, decode),
            prefill_side(data_transport(tls), **OPTIONS) as prefill,  # type: ignore[arg-type]
        ):
            for _ in range(5):
                await hand_off(prefill, decode, process)
            assert prefill.sender.agent.transports_in_use == (transport,)
            assert set(prefill.sender.agent.stats.bytes_by_transport) == {transport}

    asyncio.run(main())


@pytest.mark.parametrize("tls", ["tcp", "sm,tcp", "plain"])
def test_a_killed_decode_node_is_noticed_within_a_second_and_its_successor_is_paired(
    tls: str,
) -> None:
    async def main() -> None:
        async with prefill_side(data_transport(tls), **OPTIONS) as prefill:  # type: ignore[arg-type]
            async with decode_child(tls) as (process, decode):
                await hand_off(prefill, decode, process)
                request = make_request(32)
                name = request.sequence_id
                prefill.hand_off(decode, request)
                prefill.sender.chunk_computed(name, 24, TABLE, None)
                await process.line(what="reserved", sequence=name)
                process.signal(signal.SIGKILL)
                await until(lambda: prefill.owner.of(name) == ["failed", "free"], seconds=1.0)
                assert prefill.owner.errors[name].retryable
            async with decode_child(tls) as (process, decode):
                await hand_off(prefill, decode, process)

    asyncio.run(main())


@pytest.mark.parametrize("tls", ["tcp", "sm,tcp", "plain"])
def test_a_killed_prefill_node_costs_its_blocks_for_less_than_a_second(tls: str) -> None:
    async def main() -> None:
        async with (
            decode_side(data_transport(tls), **OPTIONS) as decode,  # type: ignore[arg-type]
            prefill_child(tls, decode, "half") as process,
        ):
            half = await process.line(what="half")
            assert half["sequence"] in decode.source.owned
            process.signal(signal.SIGKILL)
            await until(lambda: len(decode.source.free) == NUM_BLOCKS, seconds=1.0)
            assert decode.source.errors[half["sequence"]].retryable
            assert decode.receiver.num_transfers == 0

    asyncio.run(main())


@pytest.mark.parametrize("tls", ["tcp", "sm,tcp", "plain"])
def test_a_node_pairs_with_the_next_after_its_peer_was_killed(tls: str) -> None:
    """A sender that is killed while it writes to shared memory may leave the receiver's queue
    blocked for all others: then UCX is opened anew, and the next is paired a little later."""

    async def main() -> None:
        async with decode_side(data_transport(tls), **OPTIONS) as decode:  # type: ignore[arg-type]
            for _ in range(2):
                async with prefill_child(tls, decode, "half") as process:
                    await process.line(what="half")
                    process.signal(signal.SIGKILL)
                    await until(lambda: len(decode.source.free) == NUM_BLOCKS, seconds=5.0)
            async with prefill_child(tls, decode, "forever") as process:
                await process.line(what="committed")

    asyncio.run(main())


@pytest.mark.parametrize("tls", ["tcp", "sm,tcp", "plain"])
def test_a_stopped_prefill_node_is_cut_off_and_cannot_write_when_it_wakes(tls: str) -> None:
    async def main() -> None:
        async with (
            decode_side(data_transport(tls), **OPTIONS) as decode,  # type: ignore[arg-type]
            prefill_child(tls, decode, "half") as stopped,
            prefill_child(tls, decode, "forever") as other,
        ):
            decode.source.finishes_at_once = True
            half = await stopped.line(what="half")
            stopped.signal(signal.SIGSTOP)
            decode.receiver.cancel(half["sequence"])
            await other.line(what="committed")
            decode.clock.advance(1.1)
            await until(lambda: half["sequence"] not in decode.source.owned, seconds=5.0)
            stopped.signal(signal.SIGCONT)
            await other.line(what="committed")
            assert decode.receiver.num_quarantined_blocks == 0

    asyncio.run(main())
