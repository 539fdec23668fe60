"""What a move on a device says of its digests: its kernels run on the CPU here, its streams not."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kernels import kept_moves
from kernels.dispatch import interpreted
from kv_transfer import device_moves
from kv_transfer.device_moves import DeviceMoves
from kv_transfer.digests import PlaceSeal, digest_seed
from kv_transfer.frame_place import FramePlace
from kv_transfer.pool import TransferPool
from tests.kv_transfer.fake_streams import streams_do_all_at_once

if TYPE_CHECKING:
    from collections.abc import Iterator

UNIT_BYTES = 64
FRAME = FramePlace(PlaceSeal(digest_seed(bytes(16), b""), 0, 2, (0, 1, 5)), (7, 0, 3))
SLOT_BYTES = FRAME.num_units * (UNIT_BYTES + 8)


@pytest.fixture(params=["reference", "interpreter"])
def moves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceMoves]:
    """Whose streams do at once what they are given."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled in this process")
    streams_do_all_at_once(monkeypatch)
    pool = torch.randint(0, 256, (2, 10, UNIT_BYTES), dtype=torch.uint8)
    with interpreted() if request.param == "interpreter" else nullcontext():
        yield DeviceMoves([pool], takes_digests=True)


async def gathered(moves: DeviceMoves) -> torch.Tensor:
    slot = torch.zeros(SLOT_BYTES, dtype=torch.uint8)
    await moves.gather(slot, FRAME, after=None)
    return slot


def test_what_arrives_as_it_was_sent_is_verified(moves: DeviceMoves) -> None:
    async def scenario() -> None:
        assert await moves.scatter(await gathered(moves), FRAME)

    asyncio.run(scenario())


@pytest.mark.parametrize("at", [0, FRAME.num_units * UNIT_BYTES - 1, SLOT_BYTES - 1])
def test_a_byte_that_changed_on_its_way_is_found(moves: DeviceMoves, at: int) -> None:
    async def scenario() -> None:
        slot = await gathered(moves)
        slot[at] ^= 1
        assert not await moves.scatter(slot, FRAME)

    asyncio.run(scenario())


def test_blocks_of_another_transfer_are_found(moves: DeviceMoves) -> None:
    async def scenario() -> None:
        other = FRAME._replace(seal=PlaceSeal(digest_seed(bytes(15), b""), 0, 2, (0, 1, 5)))
        assert not await moves.scatter(await gathered(moves), other)

    asyncio.run(scenario())


def test_a_comparison_that_never_ran_verifies_nothing_even_after_one_that_did(
    moves: DeviceMoves, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        slot = await gathered(moves)
        assert await moves.scatter(slot, FRAME)
        monkeypatch.setattr(moves._kernels, "unpack", lambda *_: None)
        assert not await moves.scatter(slot, FRAME)

    asyncio.run(scenario())


@pytest.mark.parametrize("positions", [(2, 3, 4), (1, 2, 5)], ids=["a stretch", "with a gap"])
@pytest.mark.parametrize("is_prepared", [True, False])
def test_blocks_are_those_of_the_table_at_the_positions(
    moves: DeviceMoves, positions: tuple[int, ...], is_prepared: bool
) -> None:
    async def scenario() -> None:
        table = (9, 4, 7, 0, 3, 8)
        seal = PlaceSeal(digest_seed(bytes(16), b""), 0, 2, positions)
        ids = tuple(table[position] for position in positions)
        slot = torch.zeros(6 * (UNIT_BYTES + 8), dtype=torch.uint8)
        await moves.gather(slot, FramePlace(seal, ids), after=None)
        expected = moves._kernels._pools[0].clone()
        moves._kernels._pools[0][:, list(ids)] = 0
        if is_prepared:
            moves.prepare(table)
        assert await moves.scatter(slot, FramePlace(seal, ids, table))
        assert torch.equal(moves._kernels._pools[0], expected)

    asyncio.run(scenario())


@pytest.mark.parametrize("takes_digests", [True, False])
def test_the_kernels_that_frames_take_are_compiled_before_the_first(
    monkeypatch: pytest.MonkeyPatch, takes_digests: bool
) -> None:
    """With digests and without they are compiled apart."""
    streams_do_all_at_once(monkeypatch)
    takes = []
    for name in ("pack_and_seal", "unpack_and_check"):
        monkeypatch.setattr(kept_moves, name, lambda *given: takes.append(given[4] is not None))
    DeviceMoves([torch.zeros((1, 1, UNIT_BYTES), dtype=torch.uint8)], takes_digests=takes_digests)
    assert takes == [takes_digests, takes_digests]


@pytest.mark.parametrize("is_decoding", [True, False])
def test_two_frames_are_read_at_once_where_nothing_is_decoded(
    moves: DeviceMoves, monkeypatch: pytest.MonkeyPatch, is_decoding: bool
) -> None:
    async def scenario() -> None:
        pool = TransferPool(torch.zeros((2, 10, UNIT_BYTES), dtype=torch.uint8))
        pool._moves, pool.is_decoding = moves, lambda: is_decoding
        slot, streams = await gathered(moves), []
        unpack = moves._kernels.unpack

        def watched(stream: torch.cuda.Stream, *rest: Any) -> None:
            streams.append(stream)
            unpack(stream, *rest)

        monkeypatch.setattr(moves._kernels, "unpack", watched)
        for _ in range(3):
            assert await pool.begin_scatter(slot, FRAME)
        assert streams[0] is streams[2]
        assert (streams[0] is streams[1]) is is_decoding

    asyncio.run(scenario())


def test_lists_and_sums_are_written_behind_readers_of_both_streams_and_before_the_next(
    moves: DeviceMoves, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a frame would go to blocks of another, and its digests would still be right; or it would
    add to digests that are not zero yet."""

    async def scenario() -> None:
        slot, happened = await gathered(moves), []
        first, second = moves._stream, moves._second
        get = moves._lists.get

        def got(numbers: tuple[int, ...]) -> torch.Tensor:
            happened.append("written")
            return get(numbers)

        def made(notes: Any, device: torch.device) -> Any:
            happened.append("made")
            return notes(device)

        monkeypatch.setattr(moves._lists, "get", got)
        for stream, name in ((first, "first"), (second, "second")):
            stream.wait_stream = partial(  # type: ignore[method-assign]
                lambda name, other: happened.append(
                    f"{name} waits for {'first' if other is first else 'second'}"
                ),
                name,
            )
        await moves.scatter(slot, FRAME._replace(block_ids=(1, 2, 4)))
        assert happened == ["first waits for second", "written", "second waits for first"]
        happened.clear()
        monkeypatch.setattr(device_moves, "_Notes", partial(made, device_moves._Notes))
        moves._notes.clear()
        await moves.scatter(slot, FRAME)
        assert happened == ["first waits for second", "made", "second waits for first"]

    asyncio.run(scenario())
