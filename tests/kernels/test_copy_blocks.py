from __future__ import annotations

import pytest
import torch

from kernels.copy_blocks import (
    pack_blocks,
    pack_whole_blocks,
    unpack_blocks,
    unpack_whole_blocks,
)

# Units of whole words, of words with a rest in the last chunk, and of odd bytes.
UNITS = pytest.mark.parametrize("unit_bytes", [64, 1024, 9000, 30])


def random_bytes(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8).to(device)


@UNITS
def test_packed_units_lie_by_layer_and_then_in_the_order_of_ids(
    device: torch.device, unit_bytes: int
) -> None:
    pool = random_bytes(5, 7, unit_bytes, device=device)
    ids = torch.tensor([6, 0, 3], device=device)
    out = torch.zeros(2, 3, unit_bytes, dtype=torch.uint8, device=device)
    pack_blocks(pool, 2, 2, ids, out)
    assert torch.equal(out, pool[2:4][:, ids])


@UNITS
def test_unpacking_writes_the_named_blocks_and_no_others(
    device: torch.device, unit_bytes: int
) -> None:
    pool = random_bytes(5, 7, unit_bytes, device=device)
    src = random_bytes(3, 2, unit_bytes, device=device)
    expected = pool.clone()
    expected[1, 5], expected[1, 2] = src[0]
    expected[2, 5], expected[2, 2] = src[1]
    expected[3, 5], expected[3, 2] = src[2]
    unpack_blocks(src, pool, 1, 3, torch.tensor([5, 2], device=device))
    assert torch.equal(pool, expected)


def test_a_pool_of_floats_arrives_bit_by_bit_in_another_pool(device: torch.device) -> None:
    kv = torch.randn(3, 4, 2, 2, 16, 16, device=device).to(torch.bfloat16)
    there = torch.zeros_like(kv)
    source = kv.view(3, 4, -1).view(torch.uint8)
    target = there.view(3, 4, -1).view(torch.uint8)
    slot = torch.empty(1 << 16, dtype=torch.uint8, device=device)
    out = slot[: 3 * 2 * source.shape[2]].view(3, 2, -1)
    pack_blocks(source, 0, 3, torch.tensor([3, 1], device=device), out)
    unpack_blocks(out, target, 0, 3, torch.tensor([0, 2], device=device))
    assert torch.equal(there[:, [0, 2]], kv[:, [3, 1]])
    assert there[:, [1, 3]].count_nonzero() == 0


def test_a_slot_that_starts_at_an_odd_byte(device: torch.device) -> None:
    pool = random_bytes(2, 4, 64, device=device)
    slot = torch.zeros(3 + 2 * 2 * 64, dtype=torch.uint8, device=device)
    out = slot[3:].view(2, 2, 64)
    ids = torch.tensor([1, 3], device=device)
    pack_blocks(pool, 0, 2, ids, out)
    assert torch.equal(out, pool[:, ids])
    assert slot[:3].count_nonzero() == 0


def test_no_blocks_and_no_layers(device: torch.device) -> None:
    pool = random_bytes(2, 4, 64, device=device)
    before = pool.clone()
    no_ids = torch.empty(0, dtype=torch.int64, device=device)
    nothing = torch.empty(2, 0, 64, dtype=torch.uint8, device=device)
    pack_blocks(pool, 0, 2, no_ids, nothing)
    unpack_blocks(nothing, pool, 0, 2, no_ids)
    unpack_blocks(nothing[:0], pool, 2, 0, no_ids)
    assert torch.equal(pool, before)


@pytest.mark.parametrize(("heads", "num_parts", "row"), [(4, 2, 160), (8, 4, 4100), (2, 2, 15)])
def test_parts_of_units_make_whole_ones_in_the_order_of_heads(
    device: torch.device, heads: int, num_parts: int, row: int
) -> None:
    """`row`: bytes that one head keeps of the keys of a block."""
    whole = random_bytes(3, 5, 2, heads, row, device=device)
    shards = [each.flatten(2).contiguous() for each in whole.chunk(num_parts, dim=3)]
    ids = torch.tensor([4, 1], device=device)
    out = torch.full((2, 2, 2 * heads * row), 0xA5, dtype=torch.uint8, device=device)
    for part, shard in enumerate(shards):
        pack_blocks(shard, 1, 2, ids, out, part=part, num_parts=num_parts)
    assert torch.equal(out, whole[1:][:, ids].flatten(2))
    there = [random_bytes(*shard.shape, device=device) for shard in shards]
    expected = [each.clone() for each in there]
    to = torch.tensor([0, 3], device=device)
    for part in range(num_parts):
        unpack_blocks(out, there[part], 1, 2, to, part=part, num_parts=num_parts)
        expected[part][1:, to] = shards[part][1:][:, ids]
        assert torch.equal(there[part], expected[part])


@pytest.mark.parametrize(
    ("heads", "num_parts", "row"), [(2, 1, 320), (2, 1, 15), (4, 2, 160), (8, 4, 4100), (2, 2, 15)]
)
def test_whole_blocks_are_one_run_of_bytes_each(
    device: torch.device, heads: int, num_parts: int, row: int
) -> None:
    whole = random_bytes(3, 5, 2, heads, row, device=device)
    shards = [each.flatten(2).contiguous() for each in whole.chunk(num_parts, dim=3)]
    ids = torch.tensor([4, 1], device=device)
    out = torch.full((2, 3, 2 * heads * row), 0xA5, dtype=torch.uint8, device=device)
    for part, shard in enumerate(shards):
        pack_whole_blocks(shard, ids, out, part=part, num_parts=num_parts)
    assert torch.equal(out, whole[:, ids].flatten(2).transpose(0, 1))
    there = [random_bytes(*shard.shape, device=device) for shard in shards]
    expected = [each.clone() for each in there]
    to = torch.tensor([0, 3], device=device)
    for part in range(num_parts):
        unpack_whole_blocks(out, there[part], to, part=part, num_parts=num_parts)
        expected[part][:, to] = shards[part][:, ids]
        assert torch.equal(there[part], expected[part])
