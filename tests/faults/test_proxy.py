"""Each fault of the proxy reaches the bytes it names, its counter says so; nothing else happens."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from tests.faults.proxy import FaultProxy, Faults, fault_proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

FAULTS = ("delayed", "held", "blackholed", "reset", "truncated", "flipped", "duplicated")


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while piece := await reader.read(1 << 14):
            writer.write(piece)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@asynccontextmanager
async def echo_through_proxy(seed: int = 1) -> AsyncIterator[FaultProxy]:
    """A server that sends back what it gets, behind a proxy."""
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with fault_proxy("127.0.0.1", port, seed=seed) as proxy:
        yield proxy
    server.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=5)


async def echoed(proxy: FaultProxy, data: bytes) -> bytes:
    """What comes back of `data` until the end. Raises `ConnectionError` after RST."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    sending = asyncio.create_task(_send(writer, data))
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        await asyncio.wait([sending])
        sending.exception()
        writer.close()


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()
    writer.write_eof()


def some_bytes(count: int) -> bytes:
    return random.Random(count).randbytes(count)


def injected(proxy: FaultProxy) -> dict[str, int]:
    return {name: proxy.counters[name] for name in FAULTS if proxy.counters[name]}


def test_without_faults_all_bytes_pass_and_no_fault_is_counted() -> None:
    async def scenario() -> None:
        data = some_bytes(200_000)
        async with echo_through_proxy() as proxy:
            assert await echoed(proxy, data) == data
            assert injected(proxy) == {}
            assert proxy.counters["bytes_up"] == proxy.counters["bytes_down"] == len(data)

    asyncio.run(scenario())


@pytest.mark.parametrize("at", [0, 1, 16_384, 50_000, 99_999])
def test_a_flip_changes_one_bit_of_one_byte(at: int) -> None:
    async def scenario() -> None:
        data = some_bytes(100_000)
        async with echo_through_proxy() as proxy:
            proxy.faults_up = Faults(flip_at=at)
            back = await echoed(proxy, data)
        assert len(back) == len(data)
        assert [i for i in range(len(data)) if back[i] != data[i]] == [at]
        assert (back[at] ^ data[at]).bit_count() == 1
        assert injected(proxy) == {"flipped": 1}

    asyncio.run(scenario())


def test_a_flip_beyond_the_last_byte_is_a_miss_that_shows() -> None:
    async def scenario() -> None:
        async with echo_through_proxy() as proxy:
            proxy.faults_up = Faults(flip_at=100)
            assert await echoed(proxy, some_bytes(100)) == some_bytes(100)
        assert injected(proxy) == {}

    asyncio.run(scenario())


@pytest.mark.parametrize("after", [0, 1, 30_000])
def test_truncation_passes_that_many_bytes_and_ends_the_way(after: int) -> None:
    async def scenario() -> None:
        data = some_bytes(100_000)
        async with echo_through_proxy() as proxy:
            proxy.faults_down = Faults(truncate_after=after)
            assert await echoed(proxy, data) == data[:after]
        assert injected(proxy) == {"truncated": 1}
        assert proxy.counters["bytes_down"] == after

    asyncio.run(scenario())


@pytest.mark.parametrize("after", [1, 30_000])
def test_a_reset_reaches_the_client_as_one(after: int) -> None:
    async def scenario() -> None:
        async with echo_through_proxy() as proxy:
            proxy.faults_up = Faults(reset_after=after)
            with pytest.raises(ConnectionError):
                await echoed(proxy, some_bytes(100_000))
        assert injected(proxy) == {"reset": 1}
        assert proxy.counters["bytes_up"] == after

    asyncio.run(scenario())


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_blackhole_of_one_way_is_silence_until_it_heals(way: str) -> None:
    async def scenario() -> None:
        async with echo_through_proxy() as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            setattr(proxy, f"faults_{way}", Faults(is_blackholed=True))
            writer.write(b"late")
            async with asyncio.timeout(10):
                while proxy.counters["blackholed"] < 4:  # noqa: ASYNC110 (a counter, no event)
                    await asyncio.sleep(0.001)
                assert proxy.counters["bytes_down"] == 0
                proxy.heal()
                writer.write(b"found")
                assert await reader.readexactly(9) == b"latefound"
            writer.close()
        assert injected(proxy) == {"blackholed": 4}

    asyncio.run(scenario())


def test_a_duplicate_passes_its_piece_twice() -> None:
    async def scenario() -> None:
        async with echo_through_proxy() as proxy:
            proxy.faults_down = Faults(duplicate_at=2)
            assert await echoed(proxy, b"reply") == b"replyreply"
        assert injected(proxy) == {"duplicated": 1}

    asyncio.run(scenario())


def test_delay_and_rate_are_counted_and_lose_nothing() -> None:
    async def scenario() -> None:
        data = some_bytes(40_000)
        async with echo_through_proxy() as proxy:
            proxy.faults_up = Faults(delay_seconds=0.001, jitter_seconds=0.002)
            proxy.faults_down = Faults(bytes_per_second=1e6)
            began = asyncio.get_running_loop().time()
            assert await echoed(proxy, data) == data
            assert asyncio.get_running_loop().time() - began >= len(data) / 1e6
        assert set(injected(proxy)) == {"delayed", "held"}

    asyncio.run(scenario())


def test_the_same_seed_draws_the_same_faults() -> None:
    async def flipped(seed: int) -> list[bytes]:
        async with echo_through_proxy(seed) as proxy:
            proxy.faults_up = Faults(flip_at=3)
            return [await echoed(proxy, bytes(8)) for _ in range(8)]

    async def scenario() -> None:
        assert await flipped(7) == await flipped(7)
        assert await flipped(7) != await flipped(8)

    asyncio.run(scenario())


def test_a_target_that_is_not_there_resets_the_client() -> None:
    async def scenario() -> None:
        server = await asyncio.start_server(_echo, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        async with fault_proxy("127.0.0.1", port, seed=1) as proxy:
            with pytest.raises(ConnectionError):
                await echoed(proxy, b"hello")

    asyncio.run(scenario())
