from __future__ import annotations

import pytest
import torch

from kernels.peer_add import peer_add

Place = tuple[torch.device, torch.dtype]


@pytest.mark.parametrize(("num_ranks", "size"), [(2, 8), (2, 4104), (3, 40_000), (4, 0)])
def test_a_sum_is_that_of_all_summands(device_and_dtype: Place, num_ranks: int, size: int) -> None:
    device, dtype = device_and_dtype
    summands = [torch.randn(size).to(device, dtype) for _ in range(num_ranks)]
    out = torch.full((size,), float("nan"), dtype=dtype, device=device)
    assert peer_add(summands, out) is out
    exact = sum(each.double() for each in summands)
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
