from __future__ import annotations

import pytest
import torch

from kernels.fp8_linear import FP8, fp8_linear, quantize_rows, quantize_weight

Place = tuple[torch.device, torch.dtype]
# Half the distance of neighbours in e4m3, relative to the smaller one.
ROUNDING = 2.0**-4


@pytest.mark.parametrize("shape", [(1, 64), (5, 80), (3, 1000)])
def test_rows_use_the_whole_range(device_and_dtype: Place, shape: tuple[int, int]) -> None:
    device, dtype = device_and_dtype
    x = (torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]).to(device, dtype)
    quantized, scales = quantize_rows(x)
    assert quantized.dtype == FP8
    assert scales.shape == (shape[0], 1)
    assert torch.equal(quantized.float().abs().amax(1).cpu(), torch.full(shape[:1], 448.0))
    restored = quantized.float() * scales
    error = (restored - x.float()).abs().cpu()
    smallest = scales.cpu() * 2.0**-9
    assert (error <= ROUNDING * 1.01 * x.float().abs().cpu() + smallest).all()


def test_a_static_scale_saturates(device: torch.device) -> None:
    x = torch.tensor([[1.0, -3.0, 500.0, -500.0]], device=device)
    quantized, scales = quantize_rows(x, torch.tensor([0.5], device=device))
    assert quantized.float().cpu().tolist() == [[2.0, -6.0, 448.0, -448.0]]
    assert scales.cpu().tolist() == [[0.5]]


def test_rows_of_zeros_stay_zero(device: torch.device) -> None:
    quantized, scales = quantize_rows(torch.zeros(2, 32, device=device))
    assert torch.equal(quantized.float().cpu(), torch.zeros(2, 32))
    assert scales.isfinite().all()


@pytest.mark.parametrize("is_static", [False, True])
def test_rows_are_normed_before_they_are_quantised(
    device_and_dtype: Place, is_static: bool
) -> None:
    device, dtype = device_and_dtype
    x = torch.randn(5, 200).to(device, dtype)
    weight = (0.5 + torch.rand(200)).to(device, dtype)
    scale = torch.tensor([0.01], device=device) if is_static else None
    quantized, scales = quantize_rows(x, scale, norm_weight=weight, eps=1e-5)
    wide = x.double().cpu()
    normed = wide * (wide.square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight.double().cpu()
    restored = quantized.double().cpu() * scales.double().cpu()
    smallest = scales.double().cpu() * 2.0**-9
    assert ((restored - normed).abs() <= ROUNDING * 1.01 * normed.abs() + smallest).all()


def test_strided_rows(device: torch.device) -> None:
    x = torch.randn(4, 96, device=device)[:, 32:64]
    quantized, scales = quantize_rows(x)
    torch.testing.assert_close(quantized.float() * scales, x, rtol=ROUNDING, atol=0.02)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 37])
def test_product_of_the_quantised_values(
    device_and_dtype: Place, num_rows: int, per_channel: bool
) -> None:
    device, dtype = device_and_dtype
    x = torch.randn(num_rows, 192).to(device, dtype)
    weight, scale = quantize_weight(torch.randn(80, 192) / 14, per_channel=per_channel)
    assert scale.shape == (80 if per_channel else 1,)
    bias = torch.randn(80).to(device, dtype)
    y = fp8_linear(x, weight.to(device), scale.to(device), bias=bias)
    assert y.shape == (num_rows, 80)
    assert y.dtype == dtype
    quantized, scales = quantize_rows(x)
    left = quantized.double().cpu() * scales.double().cpu()
    right = weight.double() * scale.double().view(-1, 1)
    expected = left @ right.T + bias.double().cpu()
    error = (y.double().cpu() - expected).norm()
    # On a GPU sums are made in the fast mode, with some 14 bits.
    allowed = max(4e-3 if device.type == "cuda" else 1e-3, torch.finfo(dtype).eps)
    assert error.item() <= allowed * expected.norm().item()


@pytest.mark.parametrize("num_rows", [1, 40, 300])
def test_what_stands_around_the_product_is_part_of_it(
    device_and_dtype: Place, num_rows: int
) -> None:
    device, dtype = device_and_dtype
    x = torch.randn(num_rows, 192).to(device, dtype)
    norm = (0.5 + torch.rand(192)).to(device, dtype)
    weight, scale = quantize_weight(torch.randn(96, 192) / 14)
    bias = torch.randn(96).to(device, dtype)
    residual = torch.randn(num_rows, 48).to(device, dtype)
    y = fp8_linear(
        x, weight.to(device), scale.to(device), bias=bias, norm_weight=norm, eps=1e-5,
        residual=residual.clone(), silu_mul=True,
    )  # fmt: skip
    assert y.dtype == dtype
    quantized, scales = quantize_rows(x, norm_weight=norm, eps=1e-5)
    left = quantized.double().cpu() * scales.double().cpu()
    product = left @ (weight.double() * scale.double().view(-1, 1)).T + bias.double().cpu()
    gate, up = product.chunk(2, 1)
    expected = gate * torch.sigmoid(gate) * up + residual.double().cpu()
    error = (y.double().cpu() - expected).norm()
    assert error.item() <= max(4e-3, 2 * torch.finfo(dtype).eps) * expected.norm().item()


@pytest.mark.gpu
@pytest.mark.parametrize("per_channel", [True, False])
def test_products_of_many_rows_take_memory_that_is_there(per_channel: bool) -> None:
    """Which between ranks spares a copy: sums are taken from where the stream lies."""
    device = torch.device("cuda")
    x = torch.randn(600, 192, device=device, dtype=torch.bfloat16)
    weight, scale = quantize_weight(torch.randn(80, 192) / 14, per_channel=per_channel)
    weight, scale = weight.to(device), scale.to(device)
    y = fp8_linear(x, weight, scale)
    quantized, scales = quantize_rows(x)
    left, right = quantized.double() * scales.double(), weight.double() * scale.double().view(-1, 1)
    expected = left @ right.T
    assert (y.double() - expected).norm() <= 4e-3 * expected.norm()
    spare = torch.empty_like(y)
    assert fp8_linear(x, weight, scale, spare=spare) is spare
    assert torch.equal(spare, y)
    residual = torch.randn_like(y)
    wanted = residual + y
    assert fp8_linear(x, weight, scale, residual=residual) is residual
    assert torch.equal(residual, wanted)
