"""One pass gives what packing and digesting one after the other do."""

from __future__ import annotations

import pytest
import torch

from kernels.block_digest import block_digests
from kernels.copy_and_digest import pack_and_digest, unpack_and_digest
from kernels.copy_blocks import pack_blocks, unpack_blocks

PARTS = pytest.mark.parametrize(
    ("num_parts", "unit_bytes"), [(1, 64), (1, 9000), (1, 40000), (2, 160), (2, 16440), (4, 512)]
)


def random_bytes(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8).to(device)


def make_pools(num_parts: int, unit_bytes: int, device: torch.device) -> list[torch.Tensor]:
    return [random_bytes(5, 7, unit_bytes, device=device) for _ in range(num_parts)]


@PARTS
def test_packing(device: torch.device, num_parts: int, unit_bytes: int) -> None:
    pools = make_pools(num_parts, unit_bytes, device)
    ids = torch.tensor([6, 0, 3], device=device)
    expected = random_bytes(2, 3, num_parts * unit_bytes, device=device)
    out, digests = expected.clone(), torch.zeros(6, dtype=torch.int64, device=device)
    for part, pool in enumerate(pools):
        pack_blocks(pool, 2, 2, ids, expected, part=part, num_parts=num_parts)
    pack_and_digest(out, pools, 2, 2, ids, 3, digests)
    assert torch.equal(out, expected)
    assert torch.equal(digests, block_digests(expected, 6))


@PARTS
def test_unpacking(device: torch.device, num_parts: int, unit_bytes: int) -> None:
    pools = make_pools(num_parts, unit_bytes, device)
    expected = [pool.clone() for pool in pools]
    src = random_bytes(3, 2, num_parts * unit_bytes, device=device)
    ids = torch.tensor([5, 2], device=device)
    digests = torch.zeros(6, dtype=torch.int64, device=device)
    for part, pool in enumerate(expected):
        unpack_blocks(src, pool, 1, 3, ids, part=part, num_parts=num_parts)
    unpack_and_digest(src, pools, 1, 3, ids, 2, digests)
    assert all(map(torch.equal, pools, expected))
    assert torch.equal(digests, block_digests(src, 6))


def test_many_units_for_each_program(device: torch.device) -> None:
    pools = [random_bytes(3, 100, 128, device=device)]
    ids = torch.randperm(100)[:77].to(device)
    out = torch.empty(3, 77, 128, dtype=torch.uint8, device=device)
    digests = torch.zeros(3 * 77, dtype=torch.int64, device=device)
    pack_and_digest(out, pools, 0, 3, ids, 77, digests)
    assert torch.equal(out, pools[0][:, ids])
    assert torch.equal(digests, block_digests(out, 3 * 77))


def test_no_blocks(device: torch.device) -> None:
    pools = make_pools(1, 64, device)
    nothing = torch.empty(2, 0, 64, dtype=torch.uint8, device=device)
    no_ids = torch.empty(0, dtype=torch.int64, device=device)
    digests = torch.zeros(0, dtype=torch.int64, device=device)
    pack_and_digest(nothing, pools, 0, 2, no_ids, 0, digests)
    unpack_and_digest(nothing, pools, 0, 2, no_ids, 0, digests)


def test_what_lies_behind_the_front_is_left_alone(device: torch.device) -> None:
    """Slots, lists of ids and digests are longer than most frames."""
    pools = make_pools(1, 64, device)
    ids = torch.tensor([6, 0, 3, 5], device=device)
    slot = torch.full((2 * 3 * 64 + 100,), 0xA5, dtype=torch.uint8, device=device)
    digests = torch.zeros(9, dtype=torch.int64, device=device)
    pack_and_digest(slot, pools, 1, 2, ids, 3, digests)
    front = slot[: 2 * 3 * 64].view(2, 3, 64)
    assert torch.equal(front, pools[0][1:3][:, ids[:3]])
    assert (slot[2 * 3 * 64 :] == 0xA5).all()
    assert torch.equal(digests[:6], block_digests(front, 6))
    assert not digests[6:].any()
