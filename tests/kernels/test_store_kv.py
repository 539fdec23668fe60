from __future__ import annotations

import math

import pytest
import torch

from kernels.store_kv import store_kv

Place = tuple[torch.device, torch.dtype]


@pytest.mark.parametrize(("heads", "head_size"), [(1, 16), (2, 64), (3, 80)])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_tokens_land_in_their_slots_and_nowhere_else(
    device_and_dtype: Place, heads: int, head_size: int, index_dtype: torch.dtype
) -> None:
    device, dtype = device_and_dtype
    block_size, num_blocks, num_tokens = 8, 5, 11
    # Key and value are views of a projection that also holds two query heads.
    qkv = torch.randn(num_tokens, 2 + 2 * heads, head_size).to(device, dtype)
    key, value = qkv[:, 2 : 2 + heads], qkv[:, 2 + heads :]
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    kv_layer = torch.full(
        (num_blocks, 2, heads, block_size, head_size), math.nan, dtype=dtype, device=device
    )
    expected = kv_layer.clone()
    for token, slot in enumerate(slots.tolist()):
        expected[slot // block_size, 0, :, slot % block_size] = key[token]
        expected[slot // block_size, 1, :, slot % block_size] = value[token]
    store_kv(key, value, kv_layer, slots.to(device, index_dtype))
    torch.testing.assert_close(kv_layer, expected, rtol=0, atol=0, equal_nan=True)


def test_padding_tokens_are_skipped(device: torch.device) -> None:
    key, value = torch.randn(2, 4, 2, 16, device=device)
    kv_layer = torch.zeros(2, 2, 2, 4, 16, device=device)
    slots = torch.tensor([-1, 7, -1, 0], device=device)
    store_kv(key, value, kv_layer, slots)
    assert torch.equal(kv_layer[1, 0, :, 3], key[1])
    assert torch.equal(kv_layer[0, 1, :, 0], value[3])
    assert kv_layer.count_nonzero() == 2 * 2 * 2 * 16


def test_padding_alone_and_no_tokens_change_nothing(device: torch.device) -> None:
    key, value = torch.randn(2, 3, 2, 16, device=device)
    kv_layer = torch.zeros(2, 2, 2, 4, 16, device=device)
    store_kv(key, value, kv_layer, torch.full((3,), -1, device=device))
    store_kv(key[:0], value[:0], kv_layer, torch.empty(0, dtype=torch.int64, device=device))
    assert kv_layer.count_nonzero() == 0
