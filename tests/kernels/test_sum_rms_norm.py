from __future__ import annotations

import pytest
import torch

from kernels.sum_rms_norm import add_parts, sum_rms_norm

EPS = 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("num_parts", "num_rows", "size"), [(1, 3, 64), (4, 5, 96), (3, 2, 1000), (2, 7, 4096)]
)
def test_the_stream_takes_the_parts_and_is_normed(
    device: torch.device, num_parts: int, num_rows: int, size: int, dtype: torch.dtype
) -> None:
    residual = torch.randn(num_rows, size, device=device).to(dtype)
    parts = torch.randn(num_parts, num_rows, size, device=device)
    weight = torch.randn(size, device=device).to(dtype)
    stream = residual.double() + parts.double().sum(0)
    scale = (stream.square().mean(1, keepdim=True) + EPS).rsqrt()
    only_summed = residual.clone()
    y = sum_rms_norm(residual, parts, weight, EPS)
    tolerance = 2e-5 if dtype == torch.float32 else 2**-7
    expected = stream * scale * weight.double()
    torch.testing.assert_close(residual.double(), stream, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    assert add_parts(only_summed, parts) is only_summed
    assert torch.equal(only_summed, residual)
