"""Moves in host memory: the same bytes and digests however the pool is split."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.block_digest import block_digests
from kernels.host_digest import has_host_digests
from kv_transfer import host_moves
from kv_transfer.digests import DigestKind, agreed_kind
from kv_transfer.host_moves import HostMoves

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
    units = torch.zeros((2, 3, unit_bytes), dtype=torch.uint8)
    digests = HostMoves([source]).gather(units, 1, (7, 0, 3), kind)
    assert torch.equal(units, source[1:3][:, [7, 0, 3]])
    assert HostMoves([target]).scatter(
        units, 1, (2, 9, 4), kind, lambda found: np.array_equal(found, digests)
    )
    assert torch.equal(target[1:3][:, [2, 9, 4]], units)
    before[1:3, [2, 9, 4]] = units
    assert torch.equal(target, before), "other blocks and layers are left alone"


def test_the_parts_of_ranks_give_the_units_of_one_pool() -> None:
    whole = make_pool(64, 1)
    halves = whole.view(3, 10, 2, 2, 16)
    parts = [halves[:, :, :, rank].reshape(3, 10, 32).contiguous() for rank in range(2)]
    units, same = (torch.zeros((3, 2, 64), dtype=torch.uint8) for _ in range(2))
    kind = DigestKind.MULTIPLY_SHIFT
    digests = HostMoves(parts).gather(units, 0, (4, 1), kind)
    assert np.array_equal(digests, HostMoves([whole]).gather(same, 0, (4, 1), kind))
    assert torch.equal(units, same)


def test_refused_units_are_not_written() -> None:
    target = make_pool(64, 2)
    before = target.clone()
    units = torch.zeros((1, 1, 64), dtype=torch.uint8)
    kind = DigestKind.MULTIPLY_SHIFT
    assert not HostMoves([target]).scatter(units, 0, (0,), kind, lambda _: False)
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
