from __future__ import annotations

import pytest
import torch

from kernels.gated_linear import fits_gated_linear, gated_linear

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_rows", "in_size", "columns"),
    [
        (1, 64, 128),
        (128, 64, 128),
        (300, 256, 384),
        (129, 4096, 200),
        (64, 72, 8),
        (2500, 128, 5000),
    ],
)
def test_both_halves_are_multiplied_and_activated(
    dtype: torch.dtype, num_rows: int, in_size: int, columns: int
) -> None:
    x = torch.randn(num_rows, in_size, device=CUDA).to(dtype)
    weight = (torch.randn(2 * columns, in_size, device=CUDA) / in_size**0.5).to(dtype)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
    expected = gate * torch.sigmoid(gate) * up
    # The next allocation of this size takes the same memory: what is not written stays NaN.
    torch.full((num_rows, columns), torch.nan, dtype=dtype, device=CUDA)
    actual = gated_linear(x, weight)
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_it_is_for_prompts_and_batches_that_fill_its_tiles() -> None:
    weight = torch.empty(2 * 14336, 4096, dtype=torch.bfloat16, device=CUDA)
    counts = (16, 128, 192, 256, 512, 2048, 8192)
    fitting = [rows for rows in counts if fits_gated_linear(rows, weight)]
    assert fitting == [256, 2048, 8192]
    assert not fits_gated_linear(8192, weight.float())
    assert not fits_gated_linear(8192, weight.cpu())
