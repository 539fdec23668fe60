"""Hand-offs over plain TCP: blocks go from pool to pool without slots, and are still verified."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kernels.host_digest import has_host_digests
from kv_transfer import host_moves
from kv_transfer.agent import TransferAgent
from kv_transfer.config import KVTransferConfig
from kv_transfer.digests import DigestKind, PlaceSeal
from kv_transfer.frame_place import FramePlace
from kv_transfer.host_moves import ArrivalDigests, DepartureDigests, HostMoves
from kv_transfer.transports import choice
from kv_transfer.transports.choice import takes_plain_tcp
from kv_transfer.transports.loopback import LoopbackNetwork, LoopbackTransport
from kv_transfer.transports.tcp import TcpTransport
from tests.kv_transfer.catalogue_worlds import TABLE
from tests.kv_twins import (
    NUM_BLOCKS,
    DecodeSide,
    PrefillSide,
    decode_side,
    make_request,
    prefill_side,
    until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from kv_transfer.staging import Staging

needs_xxhash = pytest.mark.skipif(not has_host_digests(), reason="xxhash is not installed")


@asynccontextmanager
async def nodes() -> AsyncIterator[tuple[PrefillSide, DecodeSide]]:
    def plain() -> TcpTransport:
        return TcpTransport(connect_seconds=5.0)

    async with decode_side(plain()) as decode, prefill_side(plain()) as prefill:
        yield prefill, decode


async def hand_off(prefill: PrefillSide, decode: DecodeSide) -> str:
    request = make_request(32)
    prefill.hand_off(decode, request)
    prefill.compute(request, TABLE)
    prefill.sender.commit(request.sequence_id, 7)
    await until(lambda: "free" in prefill.owner.of(request.sequence_id))
    return request.sequence_id


@pytest.mark.parametrize("has_xxh3", [pytest.param(True, marks=needs_xxhash), False])
def test_blocks_arrive_with_and_without_the_digest_that_needs_no_slot(
    has_xxh3: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_moves, "has_host_digests", lambda: has_xxh3)

    async def main() -> None:
        async with nodes() as (prefill, decode):
            for _ in range(3):
                name = await hand_off(prefill, decode)
                assert prefill.owner.of(name) == ["committed", "free"]
                received = decode.pool[:, list(decode.source.owned[name])]
                assert torch.equal(received, prefill.pool[:, TABLE])
                decode.source.free.extend(decode.source.owned.pop(name))
            assert prefill.sender.agent.transports_in_use == ("tcp",)

    asyncio.run(main())


@needs_xxhash
def test_frames_are_larger_but_fewer_where_their_slots_stay_empty() -> None:
    pool = torch.zeros((2, 4, 64), dtype=torch.uint8)
    config = KVTransferConfig()
    plain = TransferAgent((pool,), config, TcpTransport(connect_seconds=5.0))
    other = TransferAgent((pool,), config, LoopbackTransport(LoopbackNetwork()))
    assert (plain.limits.slot_bytes, other.limits.slot_bytes) == (32 << 20, 8 << 20)
    for agent, share in ((plain, 2), (plain.beside(6), 2), (other, 6)):
        assert share_of(agent.staging) == share
    plain.pool.close()
    other.pool.close()


def share_of(staging: Staging) -> int:
    """How many slots one peer gets."""

    async def take() -> int:
        waiting = [asyncio.ensure_future(staging.acquire("peer")) for _ in range(9)]
        await asyncio.sleep(0)
        taken = staging.num_owned_by("peer")
        for each in waiting:
            each.cancel()
        await asyncio.wait(waiting)
        return taken

    return asyncio.run(take())


@needs_xxhash
def test_blocks_that_change_between_the_wire_and_their_digests_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add = DepartureDigests.add

    def change_then(self: DepartureDigests, units: Sequence[Any]) -> None:
        units[0][0] ^= 1
        add(self, units)

    monkeypatch.setattr(DepartureDigests, "add", change_then)

    async def main() -> None:
        async with nodes() as (prefill, decode):
            name = await hand_off(prefill, decode)
            assert prefill.owner.of(name) == ["failed", "free"]
            await until(lambda: len(decode.source.free) == NUM_BLOCKS)
            assert decode.source.errors[name].reason == "digest_mismatch"
            assert name not in decode.source.first_tokens

    asyncio.run(main())


@needs_xxhash
@pytest.mark.parametrize(("is_looked_at", "end"), [(True, "failed"), (False, "committed")])
def test_blocks_without_digests_are_taken_only_by_who_measures_what_digests_cost(
    is_looked_at: bool, end: str
) -> None:
    async def main() -> None:
        async with nodes() as (prefill, decode):
            prefill.sender.agent.pool.takes_digests = False
            decode.receiver.agent.pool.takes_digests = is_looked_at
            name = await hand_off(prefill, decode)
            assert prefill.owner.of(name) == [end, "free"]

    asyncio.run(main())


@needs_xxhash
def test_digests_fit_the_pieces_however_they_are_dealt_out_and_lack_what_did_not_come() -> None:
    moves = HostMoves([torch.randint(0, 256, (3, 10, 64), dtype=torch.uint8)])
    assert moves.has_pieces(DigestKind.XXH3)
    assert not moves.has_pieces(DigestKind.MULTIPLY_SHIFT)
    seal = PlaceSeal(5, 1, 2, (0, 1, 4))
    leaving, arriving = DepartureDigests(seal), ArrivalDigests(seal)
    units = moves.pieces(FramePlace(seal, (7, 0, 3)))
    for start, end in ((0, 4), (4, 6)):
        assert not leaving.sealed.any()
        leaving.add(units[start:end])
    assert np.array_equal(leaving.sealed, seal.seal(unit_digests_of(units)).reshape(-1))
    arriving.claimed[:] = leaving.sealed
    for start, end in ((0, 1), (1, 5), (5, 6)):
        assert not arriving.are_right
        arriving.add(units[start:end])
    assert arriving.are_right
    arriving.claimed[3] += np.uint64(1)
    assert not arriving.are_right


def unit_digests_of(units: list[Any]) -> Any:
    whole = torch.from_numpy(np.stack(units).reshape(2, 3, 64))
    return host_moves.unit_digests(whole, DigestKind.XXH3)


@pytest.mark.parametrize(
    ("options", "found", "is_plain"),
    [
        ({}, ("tcp", "sysv"), True),
        ({}, ("tcp", "rc_mlx5"), False),
        ({"require_transport": "tcp"}, ("tcp", "rc_mlx5"), True),
        ({"require_transport": "rdma"}, ("tcp", "rc_mlx5"), False),
        ({"require_transport": "shm"}, ("tcp",), False),
        ({"ucx_tls": "tcp"}, ("tcp",), False),
    ],
)
def test_nodes_in_host_memory_take_plain_tcp_unless_ucx_has_better_or_is_told(
    options: dict[str, Any],
    found: tuple[str, ...],
    is_plain: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("UCX_TLS", raising=False)
    monkeypatch.setattr(choice, "find_transports", lambda: found)
    assert takes_plain_tcp(KVTransferConfig(**options)) == is_plain
