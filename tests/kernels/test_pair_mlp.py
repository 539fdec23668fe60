from __future__ import annotations

import pytest
import torch

from kernels.pair_mlp import cut_of, fits_pair_mlp, new_counters, pair_mlp

CUDA = torch.device("cuda")
H200 = 132  # multiprocessors
# Of an 8B model; few outputs, so that parts are many and short; a last row of tiles of gates that
# is nearly full.
SHAPES = [(4096, 14336), (512, 13568), (1024, 16128)]


def matrices(
    hidden: int, inter: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up = (torch.randn(2 * inter, hidden, device=device) / hidden**0.5).to(dtype)
    down = (torch.randn(hidden, inter, device=device) / inter**0.5).to(dtype)
    return gate_up, down


def expected_product(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = (x.double() @ gate_up.double().T).chunk(2, dim=1)
    activated = (gate * torch.sigmoid(gate) * up).to(x.dtype)
    return activated.double() @ down.double().T


@pytest.mark.parametrize(("hidden", "inter"), SHAPES)
def test_the_second_product_is_cut_for_those_who_are_early(hidden: int, inter: int) -> None:
    cut = cut_of(hidden, inter, H200)
    assert cut is not None
    early = H200 - 2 * inter // 128 % H200
    late = H200 - cut.tiles
    assert cut.tiles == hidden // 128 <= early
    assert cut.parts * cut.tiles <= late < (cut.parts + 1) * cut.tiles
    # A front part and the tile of gates that others have more are about as long as their part.
    blocks = inter // 128
    ends = (cut.front, hidden // 128 + (blocks - cut.front) / cut.parts)
    assert abs(ends[0] - ends[1]) <= 1.5


def test_shapes_whose_tiles_fill_every_round_are_not_cut() -> None:
    assert cut_of(4096, 128 * 66, H200) is None  # no tile of gates is missing anywhere
    assert cut_of(8192, 14336, H200) is None  # more tiles than early thread blocks
    assert cut_of(4096, 4096, H200) is None  # not one tile of gates for each thread block


def test_on_a_cpu_it_is_one_part() -> None:
    gate_up, down = matrices(64, 128, torch.float32, torch.device("cpu"))
    x = torch.randn(3, 64)
    (part,) = pair_mlp(x, gate_up, down, torch.empty(0))
    torch.testing.assert_close(
        part.double(), expected_product(x, gate_up, down), rtol=1e-4, atol=1e-6
    )
    assert not fits_pair_mlp(gate_up, down)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [129, 200, 256])
@pytest.mark.parametrize(("hidden", "inter"), SHAPES)
def test_the_parts_add_up(hidden: int, inter: int, num_rows: int, dtype: torch.dtype) -> None:
    gate_up, down = matrices(hidden, inter, dtype, CUDA)
    assert fits_pair_mlp(gate_up, down)
    counters = new_counters(down)
    for _ in range(3):  # counters go on from launch to launch
        x = torch.randn(num_rows, hidden, device=CUDA).to(dtype)
        # The next allocations take the same memory: what is not written stays NaN.
        torch.full((num_rows, inter), torch.nan, dtype=dtype, device=CUDA)
        parts = pair_mlp(x, gate_up, down, counters)
        expected = expected_product(x, gate_up, down)
        error = (parts.double().sum(0) - expected).norm() / expected.norm()
        assert error < 0.3 * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_it_is_the_same_each_time_also_as_a_graph() -> None:
    gate_up, down = matrices(*SHAPES[0], torch.bfloat16, CUDA)
    counters = new_counters(down)
    x = torch.randn(256, down.shape[0], device=CUDA).bfloat16()
    first = pair_mlp(x, gate_up, down, counters)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            captured = pair_mlp(x, gate_up, down, counters)
    for _ in range(30):
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, first)
