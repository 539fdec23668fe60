from __future__ import annotations

import pytest
import torch

from kernels.scale_product import scale_product

Place = tuple[torch.device, torch.dtype]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (5, 2200)])
def test_sums_meet_their_scales_and_what_stands_behind(
    device_and_dtype: Place,
    shape: tuple[int, int],
    gated: bool,
    has_residual: bool,
    has_bias: bool,
) -> None:
    device, dtype = device_and_dtype
    product = (100 * torch.randn(shape)).to(device)
    rows, columns = torch.rand(shape[0], 1).to(device) / 50, torch.rand(shape[1]).to(device)
    bias = torch.randn(shape[1]).to(device, dtype) if has_bias else None
    out_size = shape[1] // 2 if gated else shape[1]
    residual = torch.randn(shape[0], out_size).to(device, dtype) if has_residual else None
    y = scale_product(product, rows, columns, dtype, bias=bias, residual=residual, silu_mul=gated)
    expected = product.double().cpu() * rows.double().cpu() * columns.double().cpu()
    if bias is not None:
        expected = expected + bias.double().cpu()
    if gated:
        gate, up = expected.chunk(2, 1)
        expected = gate * torch.sigmoid(gate) * up
    if residual is not None:
        expected = expected + residual.double().cpu()
    assert y.dtype == dtype
    tolerance = max(2e-6, torch.finfo(dtype).eps)
    torch.testing.assert_close(y.double().cpu(), expected, rtol=tolerance, atol=4 * tolerance)


def test_one_scale_for_all_columns_and_no_rows(device: torch.device) -> None:
    product, rows = torch.randn(3, 40, device=device), torch.rand(3, 1, device=device)
    y = scale_product(product, rows, torch.tensor([2.0], device=device), torch.float32)
    torch.testing.assert_close(y, product * rows * 2.0)
    nothing = scale_product(product[:0], rows[:0], rows[:1, 0], torch.float32)
    assert nothing.shape == (0, 40)
