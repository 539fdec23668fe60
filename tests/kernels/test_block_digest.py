from __future__ import annotations

import pytest
import torch

from kernels.block_digest import block_digests

UNIT = 1024
MASK = (1 << 64) - 1


def multiplier(index: int) -> int:
    """splitmix64 as published, seeded with b"BATON"; part of the wire format."""
    z = (int.from_bytes(b"BATON", "big") + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return (z ^ (z >> 31)) | 1


def expected_digest(unit: bytes) -> int:
    words = (int.from_bytes(unit[at : at + 4], "little") for at in range(0, len(unit), 4))
    total = sum(multiplier(index) * word for index, word in enumerate(words)) & MASK
    return total - (1 << 64) if total >> 63 else total


def random_bytes(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("num_units", "unit_bytes"), [(1, 4), (3, 64), (40, 1000), (2, 8192), (3, 8192 + 20)]
)
def test_the_digest_is_the_published_sum(
    device: torch.device, num_units: int, unit_bytes: int
) -> None:
    data = random_bytes(num_units * unit_bytes)
    expected = [expected_digest(bytes(unit.tolist())) for unit in data.view(num_units, -1)]
    digests = block_digests(data.to(device), num_units)
    assert digests.dtype == torch.int64
    assert digests.tolist() == expected


def test_extreme_words_do_not_saturate(device: torch.device) -> None:
    data = torch.full((2 * UNIT,), 255, dtype=torch.uint8)
    expected = expected_digest(b"\xff" * UNIT)
    assert block_digests(data.to(device), 2).tolist() == [expected, expected]


@pytest.mark.parametrize("bit", [0, 7, 8 * UNIT - 1, 4 * UNIT, 31, 32])
def test_one_flipped_bit_changes_the_digest_of_its_unit_alone(
    device: torch.device, bit: int
) -> None:
    data = random_bytes(3 * UNIT)
    before = block_digests(data.to(device), 3)
    data[UNIT + bit // 8] ^= 1 << bit % 8
    after = block_digests(data.to(device), 3)
    assert (before != after).tolist() == [False, True, False]


def test_swapped_units_swapped_words_and_shifted_bytes_show(device: torch.device) -> None:
    data = random_bytes(2 * UNIT).view(2, UNIT)
    first, second = block_digests(data.to(device), 2).tolist()
    assert block_digests(data.flip(0).contiguous().to(device), 2).tolist() == [second, first]
    swapped = data.clone()
    swapped[0, 0:4], swapped[0, 4:8] = data[0, 4:8], data[0, 0:4]
    assert block_digests(swapped.to(device), 2).tolist()[0] != first
    shifted = data.roll(1, dims=1)
    assert block_digests(shifted.to(device), 2).tolist()[0] != first


def test_many_units_over_several_steps(device: torch.device) -> None:
    num_units = 300
    data = random_bytes(num_units * 16).view(num_units, 16).repeat(1, 256)
    one_by_one = [expected_digest(bytes(data[unit].tolist())) for unit in (0, 150, 299)]
    digests = block_digests(data.to(device), num_units).tolist()
    assert [digests[0], digests[150], digests[299]] == one_by_one


def test_no_units(device: torch.device) -> None:
    assert block_digests(torch.empty(0, dtype=torch.uint8, device=device), 0).shape == (0,)
