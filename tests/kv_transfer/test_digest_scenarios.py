"""Reads of a source that came too late, and payloads that came in part: all must be refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.block_manager import BlockManager
from tests.kv_faults import HandDriven, two_frames
from tests.kv_transfer.catalogue_worlds import Gate, with_pair, with_peer
from tests.kv_twins import BLOCK_SIZE, DecodeSide, PrefillSide, make_request, until
from tests.sequences import make_sequence

if TYPE_CHECKING:
    from cluster.request import SequenceRequest
    from engine.reservation import Hold

NUM_PROMPTS = 12
POOL_BLOCKS = 24
LEASE_SECONDS = 0.05
READ_DELAY_SECONDS = 2.0


class Sources:
    """The prefill node's 24 blocks, held while a transfer may read them and used again after."""

    def __init__(self, prefill: PrefillSide) -> None:
        self.manager = BlockManager(POOL_BLOCKS, BLOCK_SIZE, enable_prefix_caching=False)
        self.holds: dict[str, Hold] = {}
        self._prefill = prefill
        self._freed = prefill.owner.on_sources_free
        prefill.owner.on_sources_free = self._free  # type: ignore[method-assign]

    def compute(self, request: SequenceRequest, value: int) -> list[int] | None:
        """Blocks that hold `value`, held for the transfer; None while there is no room."""
        sequence = make_sequence(request.prompt_token_ids, block_size=BLOCK_SIZE)
        if not self.manager.allocate(sequence, sequence.num_tokens):
            return None
        table = list(sequence.block_table)
        self._prefill.pool[:, table] = value
        self.holds[request.sequence_id] = self.manager.hold(table, request.sequence_id)
        self.manager.free(sequence)
        return table

    def _free(self, sequence_id: str) -> None:
        self.holds.pop(sequence_id).release()
        self._freed(sequence_id)


def test_reads_of_sources_that_may_have_been_used_again_are_all_refused() -> None:
    """A lease of 50 ms, reads two seconds late, a pool of 24 blocks under churn. A prototype that
    trusted digests alone caught 5 of 12."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        decode.source.finishes_at_once = True
        sources, gate, pool = Sources(prefill), Gate(), prefill.sender.agent.pool
        gather = pool.begin_gather
        late: list[str] = []
        for number in range(NUM_PROMPTS):
            pool.begin_gather = gate.around(gather)  # type: ignore[method-assign]
            gate.opened.clear()
            begun = len(gate.begun)
            request = make_request(8 * BLOCK_SIZE)
            prefill.hand_off(decode, request)
            table = sources.compute(request, number)
            assert table is not None
            prefill.compute(request, table)
            prefill.sender.commit(request.sequence_id, 1)
            await until(lambda begun=begun: len(gate.begun) > begun)  # type: ignore[misc]
            prefill.clock.advance(READ_DELAY_SECONDS)
            prefill.sender.sweep()
            pool.begin_gather = gather  # type: ignore[method-assign]
            await churn(prefill, decode, sources, number)
            gate.opened.set()
            late.append(request.sequence_id)
            await until(lambda name=request.sequence_id: "free" in prefill.owner.of(name))  # type: ignore[misc]
        for name in late:
            assert prefill.owner.of(name) == ["failed", "free"]
            assert prefill.owner.errors[name].reason == "lease_expired"
            assert "started" not in decode.source.of(name)
        assert sources.manager.num_free_blocks == POOL_BLOCKS

    with_pair(scenario, lease_seconds=LEASE_SECONDS)


async def churn(prefill: PrefillSide, decode: DecodeSide, sources: Sources, number: int) -> None:
    """Another prompt passes through whatever blocks are free, and arrives as it was sent."""
    request = make_request(8 * BLOCK_SIZE)
    name = request.sequence_id
    taken: list[int] = []
    start = decode.source.start

    async def compare(sequence_id: str, first_token_id: int) -> None:
        blocks = list(decode.source.owned[sequence_id])
        assert torch.all(decode.pool[:, blocks] == 100 + number)
        taken.extend(blocks)
        await start(sequence_id, first_token_id)

    decode.source.start = compare  # type: ignore[method-assign]
    prefill.hand_off(decode, request)
    table = sources.compute(request, 100 + number)
    assert table is not None
    prefill.compute(request, table)
    prefill.sender.commit(name, 1)
    await until(lambda: prefill.owner.of(name) == ["committed", "free"])
    decode.source.start = start  # type: ignore[method-assign]
    assert taken


def test_a_payload_of_which_only_a_part_came_is_refused() -> None:
    """The rest of the slot still has what the last frame left there."""

    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        for is_whole in (True, False):
            request = make_request(2 * BLOCK_SIZE)
            ticket, frames = await two_frames(peer, request)
            header, payload = frames[0]
            peer.post_header(header)
            await peer.endpoint.send(payload if is_whole else payload[:-8], header.nonce)
            await peer.post(*frames[1])
            peer.commit(ticket, num_frames=2)
            if is_whole:
                committed = (await peer.next("committed")).committed
                assert not committed.HasField("error")
                continue
            abort = (await peer.next("abort")).abort
            assert abort.error.reason == "digest_mismatch"
            peer.acknowledge(abort, num_frames_posted=2)
            await until(lambda name=request.sequence_id: name not in decode.source.owned)  # type: ignore[misc]

    with_peer(scenario, num_staging_slots=2)  # one of which a peer may have
