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
from kv_transfer.config import KVTransferConfig
from kv_transfer.digests import DigestKind
from kv_transfer.host_moves import ArrivalDigests, HostMoves, piece_digests
from kv_transfer.transports import choice
from kv_transfer.transports.choice import takes_plain_tcp
from kv_transfer.transports.tcp import TcpTransport
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

TABLE = [5, 1, 30, 7, 9, 2, 11, 12]
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
def test_blocks_that_differ_from_what_was_announced_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their digests are taken of other bytes than are sent."""

    def of_other_bytes(pieces: Sequence[Any], num_layers: int) -> Any:
        right = piece_digests(pieces, num_layers)
        right[-1, -1] ^= np.uint64(num_layers > 1)  # the receiver asks for one row
        return right

    monkeypatch.setattr("kv_transfer.pool.piece_digests", of_other_bytes)

    async def main() -> None:
        async with nodes() as (prefill, decode):
            name = await hand_off(prefill, decode)
            assert prefill.owner.of(name) == ["failed", "free"]
            await until(lambda: len(decode.source.free) == NUM_BLOCKS)
            assert decode.source.errors[name].reason == "digest_mismatch"
            assert name not in decode.source.first_tokens

    asyncio.run(main())


@needs_xxhash
def test_digests_of_what_arrives_are_those_of_the_pieces_and_lack_what_did_not() -> None:
    moves = HostMoves([torch.randint(0, 256, (3, 10, 64), dtype=torch.uint8)])
    pieces = moves.pieces(1, 2, (7, 0, 3))
    assert moves.has_pieces(DigestKind.XXH3)
    assert not moves.has_pieces(DigestKind.MULTIPLY_SHIFT)
    arrived = ArrivalDigests(6)
    message = [*pieces, np.zeros(48, dtype=np.uint8)]  # their digests follow, which are no unit
    for start, end in ((0, 1), (1, 5), (5, 7)):
        assert arrived.as_array(2) is None
        arrived.add(message[start:end])
    found = arrived.as_array(2)
    assert found is not None
    assert np.array_equal(found, piece_digests(pieces, 2))


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
