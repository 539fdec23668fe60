"""UCX is opened anew where a dead peer may have blocked the shared-memory queue for all others."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import torch

from cluster.errors import TransferFailed
from kv_transfer.transports.ucx import UcxTransport
from tests.kv_twins import until

if TYPE_CHECKING:
    from kv_transfer.transports.base import Endpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def transport(tls: str, seconds: float = 10.0) -> UcxTransport:
    return UcxTransport(ucx_tls=tls, moves_device_memory=False, connect_seconds=seconds)


class Mute(UcxTransport):
    """Connects and never says who it is, as one whose hello is stuck behind a dead peer's entry."""

    async def connect_only(self, port: int) -> None:
        raw = self._ucx.UCXEndpoint.create(self._worker, "127.0.0.1", port, True)
        self.kept = raw
        self.progress.kick()


@pytest.mark.parametrize(("tls", "num_reopenings"), [("sm,tcp", 1), ("tcp", 0)])
def test_peers_that_connect_and_are_not_heard_make_it_open_anew_if_memory_is_shared(
    tls: str, num_reopenings: int
) -> None:
    async def main() -> None:
        sessions: dict[int, Endpoint] = {}
        listening = transport(tls, seconds=0.5)
        port = await listening.listen("127.0.0.1", 0, sessions.__setitem__)
        before = transport(tls)
        await before.connect("127.0.0.1", port, 1)
        await until(lambda: 1 in sessions)
        ended: list[str] = []
        sessions[1].on_close(lambda: ended.append("ours"))

        mutes = [Mute(ucx_tls=tls, moves_device_memory=False, connect_seconds=5.0) for _ in "12"]
        for mute in mutes:
            await mute.connect_only(port)
        await until(lambda: len(listening._endpoints) == 1 - num_reopenings)
        assert listening.num_reopenings == num_reopenings
        await until(lambda: len(ended) == num_reopenings)

        after = transport(tls)
        new = await after.connect("127.0.0.1", listening.port, 2)
        await until(lambda: 2 in sessions)
        sent = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)
        received = torch.zeros_like(sent)
        await asyncio.gather(sessions[2].recv(received, 5), new.send(sent, 5))
        assert torch.equal(sent, received)
        for each in (after, before, *mutes, listening):
            await each.close()

    asyncio.run(main())


def test_a_peer_that_does_not_listen_leaves_no_endpoint_behind() -> None:
    """Every hand-off to a node that is gone tries it once more."""

    async def main() -> None:
        connecting = transport("tcp")
        for _ in range(3):
            with pytest.raises(TransferFailed):
                await connecting.connect("127.0.0.1", 9, 1)
        assert not connecting._endpoints
        await connecting.close()

    asyncio.run(main())
