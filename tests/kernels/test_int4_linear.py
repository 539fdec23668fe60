from __future__ import annotations

import pytest
import torch

from kernels.int4_linear import int4_linear, widen
from kernels.int4_packing import Int4Weight, dequantize, pack_codes
from tests.kernels.test_skinny_linear import EPS, assert_close, expected_product, poisoned

Place = tuple[torch.device, torch.dtype]


def random_weight(
    out_size: int,
    in_size: int,
    group_size: int,
    device: torch.device,
    dtype: torch.dtype,
    order: torch.Tensor | None = None,
) -> Int4Weight:
    codes = torch.randint(0, 16, (out_size, in_size), dtype=torch.uint8)
    scales = ((0.5 + torch.rand(in_size // group_size, out_size)) / (4 * in_size**0.5)).half()
    zeros = torch.randint(1, 16, scales.shape)
    weight = pack_codes(codes, scales, zeros, dtype=dtype, order=order)
    return Int4Weight(
        weight.codes.to(device),
        weight.scales.to(device),
        weight.zeros.to(device),
        group_size,
        None if order is None else order.to(device),
    )


def matrix_of(weight: Int4Weight) -> torch.Tensor:
    """float64 `[N, K]`, columns as x has them."""
    wide = Int4Weight(
        weight.codes.cpu(), weight.scales.double().cpu(), weight.zeros.double().cpu(),
        weight.group_size, None,
    )  # fmt: skip
    matrix = dequantize(wide)
    if weight.order is None:
        return matrix
    return torch.empty_like(matrix).index_copy_(1, weight.order.cpu(), matrix)


@pytest.mark.parametrize("group_size", [32, 64, 128, 320])
def test_widened_in_memory(device_and_dtype: Place, group_size: int) -> None:
    device, dtype = device_and_dtype
    in_size = 640 if group_size == 320 else 384
    weight = random_weight(48, in_size, group_size, device, dtype)
    actual = widen(weight).double().cpu()
    tolerance = max(1e-6, torch.finfo(dtype).eps)
    torch.testing.assert_close(actual, matrix_of(weight), rtol=tolerance, atol=1e-9)


@pytest.mark.parametrize("group_size", [32, 64, 128, 512])
@pytest.mark.parametrize("num_rows", [1, 7, 16, 40])
def test_product_with_norm_and_gate(
    product_device_and_dtype: Place, num_rows: int, group_size: int
) -> None:
    device, dtype = product_device_and_dtype
    weight = random_weight(96, 512, group_size, device, dtype)
    x = (2 * torch.randn(num_rows, 512)).to(device, dtype)
    norm_weight = (1 + 0.3 * torch.randn(512)).to(device, dtype)
    out = poisoned(num_rows, 48, like=x)
    y = int4_linear(x, weight, norm_weight=norm_weight, eps=EPS, silu_mul=True, out=out)
    assert y is out
    matrix = matrix_of(weight)
    assert_close(y, expected_product(x, matrix, norm_weight=norm_weight, silu_mul=True), 2.0)


@pytest.mark.parametrize("num_rows", [1, 9, 33])
def test_bias_and_residual(product_device_and_dtype: Place, num_rows: int) -> None:
    device, dtype = product_device_and_dtype
    weight = random_weight(64, 320, 64, device, dtype)
    x = torch.randn(num_rows, 320).to(device, dtype)
    bias, residual = torch.randn(64).to(device, dtype), torch.randn(num_rows, 64).to(device, dtype)
    y = int4_linear(x, weight, bias=bias, residual=residual)
    assert_close(y, expected_product(x, matrix_of(weight), bias=bias, residual=residual), 2.0)


@pytest.mark.parametrize("num_rows", [1, 20])
def test_inputs_in_the_order_of_their_groups(
    product_device_and_dtype: Place, num_rows: int
) -> None:
    device, dtype = product_device_and_dtype
    weight = random_weight(32, 256, 128, device, dtype, torch.randperm(256))
    x = torch.randn(num_rows, 256).to(device, dtype)
    assert_close(int4_linear(x, weight), expected_product(x, matrix_of(weight)), 2.0)


def test_no_rows(device: torch.device) -> None:
    weight = random_weight(32, 64, 64, device, torch.float16)
    y = int4_linear(torch.empty(0, 64, dtype=torch.float16, device=device), weight)
    assert y.shape == (0, 32)
