from __future__ import annotations

from dataclasses import replace

import torch

from engine.kv_cache import KVCache, KVLayout

LAYOUT = KVLayout(num_layers=3, block_size=16, num_kv_heads=2, head_size=8, dtype=torch.bfloat16)


def test_a_unit_is_one_layer_of_one_block() -> None:
    cache = KVCache.allocate(LAYOUT, 5, torch.device("cpu"))
    assert LAYOUT.unit_bytes == 2 * 2 * 16 * 8 * 2
    assert LAYOUT.block_bytes == 3 * LAYOUT.unit_bytes
    assert cache.as_bytes().shape == (3, 5, LAYOUT.unit_bytes)
    assert cache.num_blocks == 5


def test_bytes_are_the_memory_of_the_tensor() -> None:
    cache = KVCache.allocate(LAYOUT, 5, torch.device("cpu"))
    cache.layers[1][3] = 1.5
    units = cache.as_bytes()
    assert units[1, 3].view(torch.bfloat16).tolist() == [1.5] * (LAYOUT.unit_bytes // 2)
    assert not units[1, 2].any()
    assert not units[0].any()


def test_new_memory_is_zero() -> None:
    assert not KVCache.allocate(LAYOUT, 64, torch.device("cpu")).tensor.any()


def test_nodes_are_compatible_when_model_and_layout_are_the_same() -> None:
    assert LAYOUT.compatibility_hash("m", 1) == replace(LAYOUT).compatibility_hash("m", 1)
    others = {
        LAYOUT.compatibility_hash("n", 1),
        LAYOUT.compatibility_hash("m", 2),
        replace(LAYOUT, num_layers=4).compatibility_hash("m", 1),
        replace(LAYOUT, block_size=32).compatibility_hash("m", 1),
        replace(LAYOUT, num_kv_heads=1, head_size=16).compatibility_hash("m", 1),
        replace(LAYOUT, dtype=torch.float16).compatibility_hash("m", 1),
    }
    assert len(others) == 6
    assert LAYOUT.compatibility_hash("m", 1) not in others
