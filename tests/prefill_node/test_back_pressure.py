"""A peer that takes nothing holds a prefill node up, and costs it no more than it had set aside."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from kv_transfer.transports.loopback import LoopbackEndpoint, LoopbackNetwork, LoopbackTransport
from tests.kv_twins import NUM_BLOCKS, decode_side, handoff_to, prefill_side, until
from tests.node_doubles import BLOCK_SIZE, GATEWAY, request, settle
from tests.prefill_node.test_service import World, run

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from cluster.request import SequenceRequest

BLOCKS_EACH = 4
NUM_PROMPTS, NUM_THAT_FIT = 12, NUM_BLOCKS // BLOCKS_EACH
NUM_SLOTS = 4
SHARE = 3 * NUM_SLOTS // 4  # what one peer may have of them
MESSAGES_EACH = 3  # of a prompt, which is one frame: header, payload, commit


class ShutLink(LoopbackTransport):
    """What is posted waits until `open`."""

    def __init__(self, network: LoopbackNetwork) -> None:
        super().__init__(network)
        self.waiting: list[Callable[[], None]] = []
        self._is_open = False

    async def connect(self, host: str, port: int, session_id: int) -> LoopbackEndpoint:
        endpoint = await super().connect(host, port, session_id)
        send = endpoint.send

        def send_later(buffer: torch.Tensor, tag: int) -> asyncio.Future[None]:
            if self._is_open:
                return send(buffer, tag)
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

            def post() -> None:
                send(buffer, tag).add_done_callback(lambda _: ended.set_result(None))

            self.waiting.append(post)
            return ended

        endpoint.send = send_later  # type: ignore[method-assign]
        return endpoint

    def open(self) -> None:
        self._is_open = True
        for post in self.waiting:
            post()


def prompt(number: int) -> SequenceRequest:
    """None begins as another does."""
    first, length = 100 * number, BLOCKS_EACH * BLOCK_SIZE - 1
    tokens = tuple(range(first, first + length))
    return replace(request(f"prompt-{number}", length), prompt_token_ids=tokens)


def test_a_peer_that_takes_nothing_holds_prompts_back_until_it_takes_frames_again() -> None:
    async def body(world: World) -> None:
        network = LoopbackNetwork()
        link, manager = ShutLink(network), world.engine.block_manager
        async with (
            decode_side(LoopbackTransport(network)) as decode,
            prefill_side(link, events=world.handler, num_staging_slots=NUM_SLOTS) as prefill,
        ):
            decode.source.finishes_at_once = True
            sender, staging = prefill.sender, prefill.sender.agent.staging
            member = cast("Any", world.member)
            world.handler.bind(world.loop, world.observer, sender, member)
            for number in range(NUM_PROMPTS):
                world.handler.submit(GATEWAY, prompt(number), handoff_to(decode))
            await until(lambda: len(link.waiting) == SHARE * MESSAGES_EACH)
            await until(lambda: manager.num_held_blocks == NUM_BLOCKS)
            await settle(world.loop)
            assert (world.scheduler.num_running, world.scheduler.num_waiting) == (0, 4)
            assert sender.num_transfers == NUM_THAT_FIT
            assert manager.num_free_blocks == 0
            assert staging.num_free == NUM_SLOTS - SHARE
            assert len(link.waiting) == SHARE * MESSAGES_EACH
            link.open()
            await until(lambda: sender.num_transfers == 0)
            deltas = await world.gateway.published()
            handed_off = {delta.sequence_id for delta in deltas if delta.handed_off}
            assert handed_off == {f"prompt-{number}" for number in range(NUM_PROMPTS)}
            assert all(delta.error is None for delta in deltas)
            await world.check_over()

    run(body, num_blocks=NUM_BLOCKS, num_batched_tokens=64)
