"""The in-process twin of a transport keeps the rules of the others."""

from __future__ import annotations

import asyncio

import torch

from kv_transfer.transports.loopback import LoopbackEndpoint


def test_a_receive_that_nobody_waits_for_any_more_takes_nothing_and_breaks_no_send() -> None:
    async def main() -> None:
        one, other = LoopbackEndpoint.pair()
        given_up, waited_for = (torch.zeros(4, dtype=torch.uint8) for _ in range(2))
        other.recv(given_up, 5).cancel()
        received = other.recv(waited_for, 5)
        await one.send(torch.ones(4, dtype=torch.uint8), 5)
        await received
        assert not given_up.any()
        assert waited_for.all()

    asyncio.run(main())
