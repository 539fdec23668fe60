from __future__ import annotations

import pytest
import torch

from kernels.silu_mul import silu_mul

Place = tuple[torch.device, torch.dtype]


@pytest.mark.parametrize("shape", [(1, 2), (3, 96), (2, 3, 2 * 1500)])
def test_gate_is_the_first_half(device_and_dtype: Place, shape: tuple[int, ...]) -> None:
    device, dtype = device_and_dtype
    gate_up = (4 * torch.randn(shape)).to(device, dtype)
    gate, up = gate_up.double().cpu().chunk(2, -1)
    y = silu_mul(gate_up)
    assert y.dtype == dtype
    tolerance = max(2e-6, 2 * torch.finfo(dtype).eps)
    expected = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(y.double().cpu(), expected, rtol=tolerance, atol=1e-3 * tolerance)


def test_extreme_gates_neither_overflow_nor_vanish(device: torch.device) -> None:
    gate_up = torch.tensor([[-80.0, 0.0, 80.0, 2.0, 2.0, 2.0]], device=device)
    y = silu_mul(gate_up).cpu()
    torch.testing.assert_close(y, torch.tensor([[0.0, 0.0, 160.0]]))


def test_no_rows(device: torch.device) -> None:
    assert silu_mul(torch.empty(0, 8, device=device)).shape == (0, 4)
