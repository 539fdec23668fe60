from __future__ import annotations

import pytest
import torch

from kernels.gather_kv import gather_kv, gathered_bytes
from tests.kernels.conftest import entered
from tests.kernels.paged import paged_case

PLACES = ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("is_float8", [False, True])
def test_sequences_are_copied_with_zeros_where_nothing_is_seen(
    place: str, window: int | None, is_float8: bool
) -> None:
    query_lens, seq_lens = [3, 1, 130, 16, 1], [3, 64, 200, 16, 129]
    with entered(place) as device:
        case = paged_case(
            query_lens,
            seq_lens,
            heads=(4, 2),
            head_size=48,
            dtype=torch.float16,
            device=device,
            is_float8=is_float8,
        )
        pool, tables = gather_kv(
            case.kv_layer,
            case.block_tables,
            case.cu_seqlens_q,
            case.seq_lens,
            block_size=128,
            dtype=torch.float16,
            kv_scales=case.kv_scales,
            sliding_window=window,
        )
    assert pool.shape[1:] == (2, 2, 128, 48)
    assert tables.tolist() == torch.arange(len(pool)).view(5, -1).tolist()
    pool, tables = pool.cpu(), tables.cpu()
    for row, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        blocks = pool[tables[row, : -(-seq_len // 128)].long()]
        copied = blocks.permute(1, 2, 0, 3, 4).reshape(2, 2, -1, 48)
        expected = case.dense_kv[row].to(torch.float16)
        first = 0 if window is None else max(0, seq_len - query_len - window + 1)
        assert not copied[:, :, :first].any()
        assert not copied[:, :, seq_len:].any()
        torch.testing.assert_close(
            copied[:, :, first:seq_len], expected[:, :, first:], rtol=1e-3, atol=0
        )


def test_the_size_of_copies_is_that_of_all_slots_the_tables_can_name() -> None:
    kv_layer = torch.empty(9, 2, 2, 16, 32, dtype=torch.float8_e4m3fn)
    tables = torch.zeros(3, 8, dtype=torch.int32)
    assert gathered_bytes(kv_layer, tables, torch.bfloat16) == 3 * 8 * 16 * 2 * 2 * 32 * 2
