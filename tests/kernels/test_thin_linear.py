from __future__ import annotations

import pytest
import torch

from kernels.rms_norm import rms_norm
from kernels.thin_linear import fits_thin_linear, thin_linear
from tests.kernels.captured import replayed_alike

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _seed_of_these(hopper: None) -> None:
    torch.manual_seed(11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 17, 32, 48, 64])
@pytest.mark.parametrize(("out_size", "in_size"), [(6144, 4096), (200, 14336), (72, 64)])
def test_the_product_with_and_without_a_residual(
    out_size: int, in_size: int, num_rows: int, dtype: torch.dtype
) -> None:
    x = torch.randn(num_rows, in_size, device=CUDA).to(dtype)
    weight = (torch.randn(out_size, in_size, device=CUDA) / in_size**0.5).to(dtype)
    residual = torch.randn(num_rows, out_size, device=CUDA).to(dtype)
    product = x.double() @ weight.double().T
    with_residual = product + residual.double()
    tolerance = 4 * torch.finfo(dtype).eps
    # The next allocation of this size takes the same memory: what is not written stays NaN.
    torch.full((num_rows, out_size), torch.nan, dtype=dtype, device=CUDA)
    actual = thin_linear(x, weight)
    torch.testing.assert_close(actual.double(), product, rtol=tolerance, atol=tolerance)
    actual = thin_linear(x, weight, residual=residual)
    assert actual is residual
    torch.testing.assert_close(actual.double(), with_residual, rtol=tolerance, atol=tolerance)


def test_a_chain_in_a_graph_reads_what_the_kernel_before_wrote() -> None:
    weight = (torch.randn(4096, 4096, device=CUDA) / 64).bfloat16()
    norm = torch.ones(4096, dtype=torch.bfloat16, device=CUDA)
    x = torch.randn(32, 4096, dtype=torch.bfloat16, device=CUDA)

    def chain() -> torch.Tensor:
        stream = x.clone()
        for _ in range(8):
            stream = thin_linear(rms_norm(stream, norm, 1e-5), weight, residual=stream)
        return stream

    assert replayed_alike(chain).isfinite().all()


def test_it_is_for_some_dozens_of_rows_and_one_block_for_a_multiprocessor() -> None:
    weight = torch.empty(6144, 4096, dtype=torch.bfloat16, device=CUDA)
    assert [rows for rows in (17, 48, 49) if fits_thin_linear(rows, weight)] == [17, 48]
    assert not fits_thin_linear(32, weight[:1024])
    assert not fits_thin_linear(32, weight.new_empty(64 * 1024, 64))
    assert not fits_thin_linear(32, weight.cpu())
