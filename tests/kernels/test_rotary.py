from __future__ import annotations

import pytest
import torch

from kernels.rotary import apply_rotary

Place = tuple[torch.device, torch.dtype]
MAX_LEN = 200


def cos_sin_cache(rotary_dim: int) -> torch.Tensor:
    frequencies = 10_000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(MAX_LEN, dtype=torch.float64)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def expected_rotation(
    x: torch.Tensor, positions: torch.Tensor, cache: torch.Tensor
) -> torch.Tensor:
    half = cache.shape[1] // 2
    wide = x.double().cpu()
    turns = torch.complex(cache[:, :half].double(), cache[:, half:].double())[positions.cpu()]
    pairs = torch.complex(wide[..., :half], wide[..., half : 2 * half]) * turns[:, None]
    return torch.cat((pairs.real, pairs.imag, wide[..., 2 * half :]), dim=-1)


@pytest.mark.parametrize(
    ("head_size", "rotary_dim"), [(16, 16), (80, 80), (96, 96), (64, 32), (128, 128)]
)
def test_query_and_key_turn_in_place_and_value_stays(
    device_and_dtype: Place, head_size: int, rotary_dim: int
) -> None:
    device, dtype = device_and_dtype
    qkv = torch.randn(7, 6 + 2 + 2, head_size).to(device, dtype)
    value = qkv[:, 8:].clone()
    positions = torch.tensor([0, 1, 199, 3, 3, 150, 64], device=device)
    cache = cos_sin_cache(rotary_dim)
    expected = expected_rotation(qkv[:, :8], positions, cache)
    apply_rotary(qkv[:, :6], qkv[:, 6:8], positions, cache.to(device))
    tolerance = max(2e-6, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(qkv[:, :8].double().cpu(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(qkv[:, 8:], value)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_positions_of_either_integer_type(device: torch.device, index_dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 3, 2, 16, device=device)
    positions = torch.tensor([5, 0, 9], dtype=index_dtype, device=device)
    cache = cos_sin_cache(16)
    expected = expected_rotation(query, positions.long(), cache)
    apply_rotary(query, key, positions, cache.to(device))
    torch.testing.assert_close(query.double().cpu(), expected, rtol=1e-6, atol=1e-6)


def test_no_tokens(device: torch.device) -> None:
    query = torch.empty(0, 2, 16, device=device)
    positions = torch.empty(0, dtype=torch.int64, device=device)
    apply_rotary(query, query[:, :1], positions, cos_sin_cache(16).to(device))
