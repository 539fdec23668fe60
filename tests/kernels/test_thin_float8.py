"""Products of some dozens of float8 rows: against the same float8 values multiplied in float64."""

from __future__ import annotations

import pytest
import torch

from kernels.fp8_linear import fp8_linear, quantize_rows, quantize_weight
from kernels.thin_gated_linear import fits_thin_gated_linear, thin_gated_linear
from kernels.thin_linear import fits_thin_linear, thin_linear
from kernels.thin_ring import Scales
from tests.kernels.captured import replayed_alike

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
# Of the result, as a whole: sums are made in the tensor cores' fast mode.
ALLOWED = 8e-3


@pytest.fixture(autouse=True)
def _seed_of_these(hopper: None) -> None:
    torch.manual_seed(11)


def quantized(num_rows: int, out_size: int, in_size: int) -> tuple[torch.Tensor, ...]:
    """Rows, weights and the scales of both, which differ from row to row."""
    x = torch.randn(num_rows, in_size, device=CUDA, dtype=torch.bfloat16)
    x *= torch.logspace(-1, 1, num_rows, device=CUDA)[:, None].bfloat16()
    weight = torch.randn(out_size, in_size, device=CUDA) / in_size**0.5
    weight *= torch.logspace(-1, 1, out_size, device=CUDA)[:, None]
    return (*quantize_rows(x), *quantize_weight(weight))


def product(
    x: torch.Tensor, by_row: torch.Tensor, weight: torch.Tensor, by_output: torch.Tensor
) -> torch.Tensor:
    return (x.double() * by_row.double()) @ (weight.double() * by_output.double()[:, None]).T


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Row by row, as rows differ in size."""
    errors = (actual.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.max().item() <= ALLOWED


@pytest.mark.parametrize("num_rows", [1, 2, 17, 40, 64, 65, 128])
@pytest.mark.parametrize(
    ("out_size", "in_size", "dtype"),
    [
        (6144, 4096, torch.bfloat16),
        (4096, 14336, torch.bfloat16),
        (200, 8320, torch.float16),
        (72, 128, torch.bfloat16),
    ],
)
def test_the_product_alone_and_with_bias_and_residual(
    out_size: int, in_size: int, dtype: torch.dtype, num_rows: int
) -> None:
    x, by_row, weight, by_output = quantized(num_rows, out_size, in_size)
    expected = product(x, by_row, weight, by_output)
    scales = Scales(by_row, by_output)
    # The next allocation of this size takes the same memory: what is not written stays NaN.
    torch.full((num_rows, out_size), torch.nan, dtype=dtype, device=CUDA)
    assert_near(thin_linear(x, weight, scales=scales, dtype=dtype), expected)
    bias = torch.randn(out_size, device=CUDA).to(dtype)
    residual = torch.randn(num_rows, out_size, device=CUDA).to(dtype)
    expected += bias.double() + residual.double()
    actual = thin_linear(x, weight, scales=scales, bias=bias, residual=residual, dtype=dtype)
    assert actual is residual
    assert_near(actual, expected)


@pytest.mark.parametrize("num_rows", [1, 17, 64, 100, 128])
@pytest.mark.parametrize(("columns", "in_size"), [(14336, 512), (200, 4096), (72, 128)])
def test_both_halves_are_multiplied_and_activated(
    columns: int, in_size: int, num_rows: int
) -> None:
    x, by_row, weight, by_output = quantized(num_rows, 2 * columns, in_size)
    gate, up = product(x, by_row, weight, by_output).chunk(2, dim=1)
    torch.full((num_rows, columns), torch.nan, dtype=torch.bfloat16, device=CUDA)
    scales = Scales(by_row, by_output)
    actual = thin_gated_linear(x, weight, scales=scales, dtype=torch.bfloat16)
    assert_near(actual, gate * torch.sigmoid(gate) * up)


@pytest.mark.parametrize("per_channel", [True, False])
def test_one_scale_for_a_whole_matrix_is_no_scale_for_each_row(per_channel: bool) -> None:
    """`fp8_linear` takes both kinds, these kernels one of them."""
    weight, scale = quantize_weight(
        torch.randn(2 * 14336, 512, device=CUDA) / 512**0.5, per_channel=per_channel
    )
    x = torch.randn(32, 512, device=CUDA, dtype=torch.bfloat16)
    rows, by_row = quantize_rows(x)
    expected = product(rows, by_row, weight, scale.expand(len(weight)))
    assert_near(fp8_linear(x, weight[:6144], scale[:6144]), expected[:, :6144])
    gate, up = expected.chunk(2, dim=1)
    actual = fp8_linear(x, weight, scale, silu_mul=True)
    assert_near(actual, gate * torch.sigmoid(gate) * up)


def test_results_are_the_same_each_time() -> None:
    x, by_row, weight, by_output = quantized(32, 4096, 14336)
    scales = Scales(by_row, by_output)
    first = thin_linear(x, weight, scales=scales, dtype=torch.bfloat16)
    for _ in range(20):
        again = thin_linear(x, weight, scales=scales, dtype=torch.bfloat16)
        assert torch.equal(again, first)


def test_a_chain_in_a_graph_reads_what_the_kernel_before_wrote() -> None:
    down, by_output = quantize_weight(torch.randn(4096, 14336, device=CUDA) / 120)
    gate_up, by_gate = quantize_weight(torch.randn(2 * 14336, 4096, device=CUDA) / 64)
    norm = torch.ones(4096, dtype=torch.bfloat16, device=CUDA)
    x = torch.randn(32, 4096, dtype=torch.bfloat16, device=CUDA)

    def chain() -> torch.Tensor:
        stream = x.clone()
        for _ in range(6):
            y = fp8_linear(stream, gate_up, by_gate, norm_weight=norm, eps=1e-5, silu_mul=True)
            stream = fp8_linear(y, down, by_output, residual=stream)
        return stream

    assert replayed_alike(chain).isfinite().all()


def test_they_are_for_some_dozens_of_rows_and_shapes_that_fill_the_gpu() -> None:
    weight = torch.empty(2 * 14336, 4096, dtype=torch.float8_e4m3fn, device=CUDA)
    counts = (0, 1, 64, 96, 128, 129)
    assert [rows for rows in counts if fits_thin_linear(rows, weight[:6144])] == [1, 64, 128]
    assert [rows for rows in counts if fits_thin_gated_linear(rows, weight)] == [1, 64, 128]
    assert not fits_thin_linear(32, weight[:1024])
    assert not fits_thin_linear(32, weight)
    assert not fits_thin_gated_linear(32, weight[:4096])
