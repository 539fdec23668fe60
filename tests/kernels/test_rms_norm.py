from __future__ import annotations

import pytest
import torch

from kernels.rms_norm import rms_norm

Place = tuple[torch.device, torch.dtype]
EPS = 1e-5


def expected_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double().cpu()
    scale = (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return wide * scale * weight.double().cpu()


def assert_rounded(actual: torch.Tensor, expected: torch.Tensor, num_roundings: int = 1) -> None:
    """Equal but for `num_roundings` roundings to actual's dtype and float32 arithmetic."""
    tolerance = max(2e-6, num_roundings * torch.finfo(actual.dtype).eps)
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("shape", [(1, 64), (3, 80), (7, 512), (2, 3, 1000)])
def test_norm_of_every_row(device_and_dtype: Place, shape: tuple[int, ...]) -> None:
    device, dtype = device_and_dtype
    x = (3 * torch.randn(shape)).to(device, dtype)
    weight = torch.randn(shape[-1]).to(device, dtype)
    y = rms_norm(x, weight, EPS)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_rounded(y, expected_norm(x, weight), 2)


def test_heads_cut_out_of_a_projection(device_and_dtype: Place) -> None:
    device, dtype = device_and_dtype
    x = torch.randn(5, 12, 48).to(device, dtype)[:, 3:10]
    weight = torch.randn(48).to(device, dtype)
    assert_rounded(rms_norm(x, weight, EPS), expected_norm(x, weight), 2)


def test_epsilon_keeps_a_row_of_zeros_zero(device: torch.device) -> None:
    y = rms_norm(torch.zeros(2, 32, device=device), torch.ones(32, device=device), EPS)
    assert torch.equal(y, torch.zeros(2, 32, device=device))


def test_no_rows(device: torch.device) -> None:
    y = rms_norm(torch.empty(0, 32, device=device), torch.ones(32, device=device), EPS)
    assert y.shape == (0, 32)
