"""What UCX raises, by whichever name, is one thing to who waits: the link is gone."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cluster.errors import TransferFailed
from kv_transfer.transports.ucx import UcxTransport

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kv_transfer.transports.base import Endpoint
    from kv_transfer.transports.ucx_endpoint import UcxEndpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]
TAG = 7


def connected(scenario: Callable[[UcxEndpoint, Endpoint], Awaitable[None]]) -> None:
    async def main() -> None:
        listening, connecting = (
            UcxTransport(ucx_tls="tcp", moves_device_memory=False, connect_seconds=10.0)
            for _ in range(2)
        )
        accepted: asyncio.Future[Endpoint] = asyncio.get_running_loop().create_future()
        port = await listening.listen("127.0.0.1", 0, lambda _, end: accepted.set_result(end))
        await scenario(await connecting.connect("127.0.0.1", port, 1), await accepted)
        await connecting.close()
        await listening.close()

    asyncio.run(main())


def bytes_of(num: int) -> torch.Tensor:
    return torch.zeros(num, dtype=torch.uint8)


def test_a_message_that_is_longer_than_its_buffer_fails_the_receive() -> None:
    async def scenario(ours: UcxEndpoint, theirs: Endpoint) -> None:
        received = theirs.recv(bytes_of(8), TAG)
        await ours.send(bytes_of(64), TAG)
        with pytest.raises(TransferFailed):
            await received

    connected(scenario)


def test_what_is_posted_ends_with_its_endpoint_and_what_is_posted_later_at_once() -> None:
    async def scenario(ours: UcxEndpoint, theirs: Endpoint) -> None:
        received = ours.recv(bytes_of(8), TAG)
        assert await ours.close()
        for ended in (received, ours.recv(bytes_of(8), TAG)):
            with pytest.raises(TransferFailed):
                await ended

    connected(scenario)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, "ucxx"])
def test_what_cannot_be_posted_fails_by_its_future(error: Any) -> None:
    async def scenario(ours: UcxEndpoint, theirs: Endpoint) -> None:
        raised = ours._transport.errors[0] if error == "ucxx" else error

        class Refusing:
            def __getattr__(self, _: str) -> Any:
                raise raised("not now")

        endpoint, ours._endpoint = ours._endpoint, Refusing()
        with pytest.raises(TransferFailed):
            await ours.send(bytes_of(8), TAG)
        ours._endpoint = endpoint

    connected(scenario)
