"""Moves in host memory: the same bytes and digests however the pool is split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.block_digest import block_digests
from kernels.host_digest import has_host_digests
from kv_transfer import host_moves
from kv_transfer.digests import DigestKind, PlaceSeal, agreed_kind, digest_seed
from kv_transfer.frame_place import FramePlace
from kv_transfer.host_moves import HostMoves
from kv_transfer.protocol import DIGEST_BYTES

SEED = digest_seed(bytes(16), b"")

KINDS = [
    DigestKind.MULTIPLY_SHIFT,
    pytest.param(
        DigestKind.XXH3,
        marks=pytest.mark.skipif(not has_host_digests(), reason="xxhash is not installed"),
    ),
]


def make_pool(unit_bytes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 10, unit_bytes), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit_bytes", [64, 36])
def test_what_is_gathered_and_scattered_is_the_same_with_the_same_digests(
    unit_bytes: int, kind: DigestKind
) -> None:
    source, target = make_pool(unit_bytes, 1), make_pool(unit_bytes, 2)
    before = target.clone()
    seal = PlaceSeal(SEED, 1, 2, (0, 1, 5))
    slot = torch.zeros(6 * (unit_bytes + DIGEST_BYTES), dtype=torch.uint8)
    HostMoves([source]).gather(slot, FramePlace(seal, (7, 0, 3)), kind)
    units = slot[: 6 * unit_bytes].view(2, 3, unit_bytes)
    assert torch.equal(units, source[1:3][:, [7, 0, 3]])
    assert HostMoves([target]).scatter(slot, FramePlace(seal, (2, 9, 4)), kind)
    assert torch.equal(target[1:3][:, [2, 9, 4]], units)
    before[1:3, [2, 9, 4]] = units
    assert torch.equal(target, before), "other blocks and layers are left alone"


def test_the_parts_of_ranks_give_the_units_of_one_pool() -> None:
    whole = make_pool(64, 1)
    halves = whole.view(3, 10, 2, 2, 16)
    parts = [halves[:, :, :, rank].reshape(3, 10, 32).contiguous() for rank in range(2)]
    slot, same = (torch.zeros(6 * (64 + DIGEST_BYTES), dtype=torch.uint8) for _ in range(2))
    kind = DigestKind.MULTIPLY_SHIFT
    frame = FramePlace(PlaceSeal(SEED, 0, 3, (0, 1)), (4, 1))
    HostMoves(parts).gather(slot, frame, kind)
    HostMoves([whole]).gather(same, frame, kind)
    assert slot.any()
    assert torch.equal(slot, same)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["a byte", "a digest", "another position", "another transfer"])
def test_what_does_not_fit_its_digests_or_its_place_is_not_written(
    what: str, kind: DigestKind
) -> None:
    source, target = make_pool(64, 1), make_pool(64, 2)
    before = target.clone()
    seal = PlaceSeal(SEED, 0, 2, (3,))
    slot = torch.zeros(2 * (64 + DIGEST_BYTES), dtype=torch.uint8)
    HostMoves([source]).gather(slot, FramePlace(seal, (7,)), kind)
    match what:
        case "a byte":
            slot[70] ^= 1
        case "a digest":
            slot[-1] ^= 1
        case "another position":
            seal = replace(seal, positions=(4,))
        case "another transfer":
            seal = replace(seal, seed=SEED + 1)
    assert not HostMoves([target]).scatter(slot, FramePlace(seal, (0,)), kind)
    assert torch.equal(target, before)


def test_the_digest_that_every_node_knows_is_that_of_the_devices() -> None:
    units = torch.randint(0, 256, (2, 3, 64), dtype=torch.uint8)
    found = host_moves.unit_digests(units, DigestKind.MULTIPLY_SHIFT)
    assert found.view(np.int64).reshape(-1).tolist() == block_digests(units, 6).tolist()


@pytest.mark.parametrize(
    ("ours", "theirs", "agreed"),
    [
        (["xxh3", "multiply_shift"], ["xxh3", "multiply_shift"], "xxh3"),
        (["xxh3", "multiply_shift"], ["multiply_shift"], "multiply_shift"),
        (["xxh3", "multiply_shift"], [], "multiply_shift"),
        (["multiply_shift"], ["xxh3", "multiply_shift"], "multiply_shift"),
        (["multiply_shift"], ["of tomorrow"], "multiply_shift"),
    ],
)
def test_nodes_agree_on_the_fastest_digest_that_both_know(
    ours: list[str], theirs: list[str], agreed: str
) -> None:
    assert agreed_kind([DigestKind(each) for each in ours], theirs) is DigestKind(agreed)
