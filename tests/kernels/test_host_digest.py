"""The digest of units in host memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.host_digest import has_host_digests, host_digests

pytestmark = pytest.mark.skipif(not has_host_digests(), reason="xxhash is not installed")


def test_it_is_xxh3_of_each_unit_whatever_the_shape() -> None:
    import xxhash

    units = torch.randint(0, 256, (3, 4, 80), dtype=torch.uint8)
    found = host_digests(units, 12)
    assert found.dtype == np.uint64
    expected = [xxhash.xxh3_64_intdigest(unit.numpy().tobytes()) for unit in units.view(12, 80)]
    assert found.tolist() == expected


def test_a_flipped_bit_changes_the_digest_of_its_unit_alone() -> None:
    data = torch.randint(0, 256, (4 * 4096,), dtype=torch.uint8)
    before = host_digests(data, 4)
    data[2 * 4096 + 17] ^= 1
    assert (host_digests(data, 4) != before).tolist() == [False, False, True, False]


def test_no_units_have_no_digests() -> None:
    assert host_digests(torch.empty(0, dtype=torch.uint8), 0).tolist() == []
