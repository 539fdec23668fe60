from __future__ import annotations

import pytest
import torch

from kernels.decode_plan import SplitPlan, plan_splits
from kernels.dispatch import runs_triton


@pytest.fixture
def plan_device(device: torch.device) -> torch.device:
    if not runs_triton(torch.empty(0, device=device)):
        pytest.skip("the CPU has a plan of its own")
    return device


def planned(
    seq_lens: list[int], device: torch.device, *, window: int | None = None, num_kv_heads: int = 2
) -> SplitPlan:
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    kv_layer = torch.empty(1, 2, num_kv_heads, 16, 128, dtype=torch.float16, device=device)
    return plan_splits(lens, kv_layer, sliding_window=window)


def tiles_of(seq_len: int, tile: int, window: int | None) -> int:
    first = 0 if window is None else max(0, seq_len - window) // tile
    return max(1, -(-seq_len // tile) - first)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    "seq_lens",
    [
        [1],
        [0],
        [5000],
        [0, 0, 4000, 0],
        [64, 65, 1, 0, 700, 128],
        [9000] + [100] * 63,
        [(37 * row) % 1500 for row in range(300)],
    ],
    ids=lambda lens: f"{len(lens)}-sequences",
)
def test_shares_are_equal_and_cover_every_tile_once(
    plan_device: torch.device, seq_lens: list[int], window: int | None
) -> None:
    plan = planned(seq_lens, plan_device, window=window)
    tiles = [tiles_of(length, plan.shape.tile, window) for length in seq_lens]
    row = [(sequence, tile) for sequence, count in enumerate(tiles) for tile in range(count)]
    share = -(-len(row) // plan.num_programs)
    covered = []
    for number, record in enumerate(plan.records.tolist()):
        sequence, tile, num_tiles, full_share, seq_len = record[:5]
        assert full_share == share
        assert num_tiles == max(0, min(share, len(row) - number * share))
        if num_tiles > 0:
            assert (sequence, tile) == row[number * share]
            assert seq_len == seq_lens[sequence]
        covered += row[number * share : number * share + num_tiles]
    assert covered == row
    assert plan.origins.tolist() == [sum(tiles[:number]) for number in range(len(tiles))]


def test_the_number_of_programs_does_not_depend_on_lengths(plan_device: torch.device) -> None:
    sizes = {planned([length] * 3, plan_device).num_programs for length in (0, 1, 400, 9000)}
    assert len(sizes) == 1


def test_more_heads_than_programs_leave_one_program_each(plan_device: torch.device) -> None:
    plan = planned([300, 40], plan_device, num_kv_heads=4096)
    assert plan.records.tolist()[0][:5] == [0, 0, 6, 6, 300]
