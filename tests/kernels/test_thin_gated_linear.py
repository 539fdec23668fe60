from __future__ import annotations

import pytest
import torch

from kernels.rms_norm import rms_norm
from kernels.thin_gated_linear import fits_thin_gated_linear, thin_gated_linear
from tests.kernels.captured import replayed_alike

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _seed_of_these(hopper: None) -> None:
    torch.manual_seed(11)


def expected_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 17, 32, 50, 64, 128])
@pytest.mark.parametrize(("columns", "in_size"), [(14336, 512), (200, 4096), (72, 64), (8192, 192)])
def test_both_halves_are_multiplied_and_activated(
    columns: int, in_size: int, num_rows: int, dtype: torch.dtype
) -> None:
    x = torch.randn(num_rows, in_size, device=CUDA).to(dtype)
    weight = (torch.randn(2 * columns, in_size, device=CUDA) / in_size**0.5).to(dtype)
    # The next allocation of this size takes the same memory: what is not written stays NaN.
    torch.full((num_rows, columns), torch.nan, dtype=dtype, device=CUDA)
    actual = thin_gated_linear(x, weight)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        actual.double(), expected_product(x, weight), rtol=tolerance, atol=tolerance
    )


def test_a_chain_in_a_graph_reads_what_the_kernel_before_wrote() -> None:
    weight = (torch.randn(2 * 1024, 1024, device=CUDA) / 16).bfloat16()
    norm = torch.ones(1024, dtype=torch.bfloat16, device=CUDA)
    x = torch.randn(32, 1024, dtype=torch.bfloat16, device=CUDA)

    def chain() -> torch.Tensor:
        y = x
        for _ in range(8):
            y = thin_gated_linear(rms_norm(y, norm, 1e-5), weight)
        return y

    assert replayed_alike(chain).isfinite().all()


def test_it_is_for_some_dozens_of_rows_and_many_weights() -> None:
    weight = torch.empty(2 * 14336, 4096, dtype=torch.bfloat16, device=CUDA)
    fitting = [rows for rows in (17, 64, 96, 128, 129) if fits_thin_gated_linear(rows, weight)]
    assert fitting == [17, 64, 128]
    assert not fits_thin_gated_linear(32, weight[:4096])
    assert not fits_thin_gated_linear(32, weight.cpu())
