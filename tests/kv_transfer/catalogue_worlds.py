"""What tests of hand-offs have in common: pairs of nodes, gates, links that hang."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kv_transfer.failures import FailureReason, failure
from kv_transfer.transports.loopback import LoopbackEndpoint, LoopbackNetwork, LoopbackTransport
from tests.kv_faults import HandDriven, hand_driven
from tests.kv_twins import (
    NUM_BLOCKS,
    DecodeSide,
    PrefillSide,
    decode_side,
    make_pool,
    prefill_side,
    twins,
    until,
)

if TYPE_CHECKING:
    import torch

    from kv_transfer.frame_place import FramePlace

TABLE = [5, 1, 30, 7, 9, 2, 11, 12]  # blocks of a prompt of 29 to 32 tokens
PairScenario = Callable[[PrefillSide, DecodeSide], Awaitable[None]]
PeerScenario = Callable[[HandDriven, DecodeSide], Awaitable[None]]


def with_pair(scenario: PairScenario, **options: Any) -> None:
    """Both halves of KV transfer, as they are."""

    async def main() -> None:
        async with twins(**options) as (prefill, decode):
            await scenario(prefill, decode)

    asyncio.run(main())


def with_peer(scenario: PeerScenario, *, gives_all_back: bool = True, **options: Any) -> None:
    """The receiving half, and a prefill node whose every message the test writes. Afterwards no
    block and no slot is missing, if it `gives_all_back`."""

    async def main() -> None:
        network = LoopbackNetwork()
        async with decode_side(LoopbackTransport(network), **options) as decode:
            async with hand_driven(network, decode, make_pool(1)) as peer:
                await scenario(peer, decode)
            if not gives_all_back:
                return
            await until(lambda: decode.receiver.num_transfers == 0)
            started = sum(len(blocks) for blocks in decode.source.owned.values())
            assert len(decode.source.free) + started == NUM_BLOCKS
            staging = decode.receiver.agent.staging
            assert staging.num_free == staging.num_slots

    asyncio.run(main())


def with_hanging_link(
    scenario: PairScenario, link: type[LoopbackTransport] | None = None, **options: Any
) -> None:
    """The prefill node's sends do not end while the connection stands: a peer that lives, but
    takes nothing. `link`: another one that hangs."""

    async def main() -> None:
        network = LoopbackNetwork()
        async with (
            decode_side(LoopbackTransport(network), **options) as decode,
            prefill_side((link or HangingTransport)(network), **options) as prefill,
        ):
            await scenario(prefill, decode)

    asyncio.run(main())


class HangingTransport(LoopbackTransport):
    """Its messages go out under tags that nobody receives."""

    async def connect(self, host: str, port: int, session_id: int) -> LoopbackEndpoint:
        endpoint = await super().connect(host, port, session_id)
        send = endpoint.send
        endpoint.send = lambda buffer, tag: send(buffer, tag ^ 1)  # type: ignore[method-assign]
        return endpoint


class StuckTransport(LoopbackTransport):
    """Its sends do not even end with the connection, as when a driver hangs, before `let_go`."""

    def __init__(self, network: LoopbackNetwork) -> None:
        super().__init__(network)
        self._stuck: list[asyncio.Future[None]] = []

    async def connect(self, host: str, port: int, session_id: int) -> LoopbackEndpoint:
        endpoint = await super().connect(host, port, session_id)
        end = endpoint.close

        def send(buffer: torch.Tensor, tag: int) -> asyncio.Future[None]:
            self._stuck.append(asyncio.get_running_loop().create_future())
            return self._stuck[-1]

        async def close() -> bool:
            await end()
            return not self._stuck

        endpoint.send, endpoint.close = send, close  # type: ignore[method-assign]
        return endpoint

    def let_go(self) -> None:
        for sent in self._stuck:
            sent.set_exception(failure(FailureReason.LINK_LOST))
        self._stuck.clear()


@dataclass
class Gate:
    """Holds moves between pool and slots back; notes what they were begun with."""

    begun: list[dict[str, Any]] = field(default_factory=list)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    def around(self, begin: Callable[..., Awaitable[Any]]) -> Callable[..., asyncio.Future[Any]]:
        def begin_gated(
            slot: torch.Tensor, frame: FramePlace, **options: Any
        ) -> asyncio.Future[Any]:
            self.begun.append({"frame": frame, **options})
            return asyncio.ensure_future(self._after(begin(slot, frame, **options)))

        return begin_gated

    async def _after(self, move: Awaitable[Any]) -> Any:
        await self.opened.wait()
        return await move


def stop_timers(prefill: PrefillSide | None, decode: DecodeSide | None) -> None:
    """Nothing happens by time alone any more."""
    sweeping = [prefill.sender._sweeping] if prefill is not None else []
    sweeping += [decode.receiver._sweeping] if decode is not None else []
    for timer in sweeping:
        assert timer is not None
        timer.cancel()
