from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from kernels.skinny_linear import skinny_linear
from tests.kernels.captured import replayed_alike
from tests.kernels.conftest import entered, parameters

Place = tuple[torch.device, torch.dtype]
EPS = 1e-5


def expected_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    weight_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    silu_mul: bool = False,
) -> torch.Tensor:
    x, matrix = x.double().cpu(), weight.double().cpu()
    if norm_weight is not None:
        x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * norm_weight.double().cpu()
    if weight_scale is not None:
        matrix = matrix * weight_scale.double().cpu().view(-1, 1)
    y = x @ matrix.T
    if bias is not None:
        y += bias.double().cpu()
    if silu_mul:
        gate, up = y.chunk(2, -1)
        y = silu(gate) * up
    return y if residual is None else y + residual.double().cpu()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, num_roundings: float = 1.5) -> None:
    assert actual.isfinite().all()
    error = (actual.double().cpu() - expected).norm() / expected.norm()
    assert error.item() < max(2e-6, num_roundings * torch.finfo(actual.dtype).eps)


def poisoned(*shape: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=like.dtype, device=like.device)


def matrix_of(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, columns).div(columns**0.5).to(device, dtype)


@pytest.mark.parametrize("num_rows", [1, 3, 8, 16, 17, 300])
def test_plain_product(product_device_and_dtype: Place, num_rows: int) -> None:
    device, dtype = product_device_and_dtype
    x = torch.randn(num_rows, 192).to(device, dtype)
    weight = matrix_of(72, 192, device, dtype)
    out = poisoned(num_rows, 72, like=x)
    assert skinny_linear(x, weight, out=out) is out
    assert_close(out, expected_product(x, weight))


@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_norm_in_front_and_gate_behind(product_device_and_dtype: Place, num_rows: int) -> None:
    device, dtype = product_device_and_dtype
    x = (3 * torch.randn(num_rows, 512)).to(device, dtype)
    weight = matrix_of(2 * 56, 512, device, dtype)
    norm_weight = (1 + 0.3 * torch.randn(512)).to(device, dtype)
    y = skinny_linear(x, weight, norm_weight=norm_weight, eps=EPS, silu_mul=True)
    assert y.shape == (num_rows, 56)
    assert_close(y, expected_product(x, weight, norm_weight=norm_weight, silu_mul=True))


@pytest.mark.parametrize("num_rows", [1, 2, 33])
def test_bias_and_residual_from_strided_rows(
    product_device_and_dtype: Place, num_rows: int
) -> None:
    device, dtype = product_device_and_dtype
    x = torch.randn(num_rows, 400).to(device, dtype)[:, 16:272]
    weight = matrix_of(50, 256, device, dtype)
    bias = torch.randn(50).to(device, dtype)
    residual = torch.randn(num_rows, 50).to(device, dtype)
    expected = expected_product(x, weight, bias=bias, residual=residual)
    assert_close(skinny_linear(x, weight, bias=bias, residual=residual), expected)


@pytest.mark.parametrize("num_rows", [1, 8])
def test_a_gate_with_bias_and_residual(product_device_and_dtype: Place, num_rows: int) -> None:
    """Of a number of outputs that no tile divides; inputs that are kept, though many."""
    device, dtype = product_device_and_dtype
    x = torch.randn(num_rows, 5120).to(device, dtype)
    weight = matrix_of(2 * 76, 5120, device, dtype)
    around: dict[str, Any] = {
        "bias": torch.randn(2 * 76).to(device, dtype),
        "residual": torch.randn(num_rows, 76).to(device, dtype),
    }
    y = skinny_linear(x, weight, silu_mul=True, **around)
    assert_close(y, expected_product(x, weight, silu_mul=True, **around), 3.0)


@pytest.mark.parametrize("num_rows", [1, 20])
def test_the_residual_may_be_written_over(product_device_and_dtype: Place, num_rows: int) -> None:
    device, dtype = product_device_and_dtype
    x = torch.randn(num_rows, 128).to(device, dtype)
    weight = matrix_of(64, 128, device, dtype)
    residual = torch.randn(num_rows, 64).to(device, dtype)
    expected = expected_product(x, weight, residual=residual)
    assert skinny_linear(x, weight, residual=residual, out=residual) is residual
    assert_close(residual, expected)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("scalar", [True, False])
@pytest.mark.parametrize("num_rows", [1, 4, 30])
def test_fp8_weights_with_their_scale(
    product_device_and_dtype: Place, num_rows: int, scalar: bool, gated: bool
) -> None:
    device, dtype = product_device_and_dtype
    if dtype == torch.float32 and device.type == "cuda":
        pytest.skip("decode runs in half precision")
    x = torch.randn(num_rows, 256).to(device, dtype)
    scale = (0.001 + 0.02 * torch.rand(1 if scalar else 96)).to(device)
    weight = (40 * torch.randn(96, 256)).clamp(-448, 448).to(torch.float8_e4m3fn).to(device)
    norm_weight = (1 + 0.3 * torch.randn(256)).to(device, dtype)
    around: dict[str, Any] = {"weight_scale": scale, "norm_weight": norm_weight, "silu_mul": gated}
    y = skinny_linear(x, weight, eps=EPS, **around)
    assert_close(y, expected_product(x, weight, **around))


@pytest.mark.parametrize("place", parameters(()))
def test_no_rows(place: tuple[str]) -> None:
    with entered(place[0]) as device:
        y = skinny_linear(torch.empty(0, 32, device=device), torch.ones(24, 32, device=device))
        assert y.shape == (0, 24)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 8])
def test_products_in_a_graph_wait_for_those_before(num_rows: int) -> None:
    """Each starts before the one in front has ended; what it reads of that must be there."""
    with entered("cuda") as device:
        dtype = torch.bfloat16
        norm_weight = torch.ones(1024, device=device, dtype=dtype)
        layers = [
            (matrix_of(2 * 2048, 1024, device, dtype), matrix_of(1024, 2048, device, dtype))
            for _ in range(16)
        ]
        start = torch.randn(num_rows, 1024).to(device, dtype)

        def run() -> torch.Tensor:
            stream = start
            for gate_up, down in layers:
                x = skinny_linear(stream, gate_up, norm_weight=norm_weight, eps=EPS, silu_mul=True)
                stream = skinny_linear(x, down, residual=stream)
            return stream

        expected = start.double().cpu()
        for gate_up, down in layers:
            x = expected_product(expected, gate_up, norm_weight=norm_weight, silu_mul=True)
            expected = expected_product(x, down, residual=expected)
        assert_close(replayed_alike(run), expected, 4.0)
