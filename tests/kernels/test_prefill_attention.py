from __future__ import annotations

import math

import pytest
import torch

from kernels.attention_plan import plan_prefill
from kernels.prefill_attention import prefill_attention
from tests.kernels.paged import PagedCase, assert_attention_close, paged_case

Place = tuple[torch.device, torch.dtype]


def attend(case: PagedCase, sliding_window: int | None = None) -> torch.Tensor:
    out = case.poisoned_out()
    query_lens = case.cu_seqlens_q.diff().tolist()
    returned = prefill_attention(
        case.query,
        case.kv_layer,
        case.block_tables,
        case.cu_seqlens_q,
        case.seq_lens,
        max_seqlen_q=max(query_lens),
        scale=case.scale,
        out=out,
        sliding_window=sliding_window,
    )
    assert returned is out
    return out


def ragged_case(
    query_lens: list[int], seq_lens: list[int], device: torch.device, dtype: torch.dtype
) -> PagedCase:
    return paged_case(query_lens, seq_lens, heads=(4, 2), head_size=32, dtype=dtype, device=device)


def test_whole_prompts_around_block_boundaries(product_device_and_dtype: Place) -> None:
    lens = [1, 15, 16, 17, 40]
    case = ragged_case(lens, lens, *product_device_and_dtype)
    assert_attention_close(attend(case), case.expected())


@pytest.mark.parametrize("query_len", [1, 64, 70, 130])
def test_a_prompt_alone(product_device_and_dtype: Place, query_len: int) -> None:
    case = ragged_case([query_len], [query_len], *product_device_and_dtype)
    assert_attention_close(attend(case), case.expected())


@pytest.mark.parametrize("prefix", [1, 16, 37, 150])
def test_a_chunk_after_a_cached_prefix(product_device_and_dtype: Place, prefix: int) -> None:
    case = ragged_case([20], [20 + prefix], *product_device_and_dtype)
    assert_attention_close(attend(case), case.expected())


def test_prefixes_and_chunks_of_all_lengths(product_device_and_dtype: Place) -> None:
    case = ragged_case([3, 1, 33, 70, 16], [3, 40, 33, 200, 90], *product_device_and_dtype)
    assert_attention_close(attend(case), case.expected())


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (8, 1)])
def test_every_query_head_reads_its_own_kv_head(
    product_device_and_dtype: Place, heads: tuple[int, int]
) -> None:
    device, dtype = product_device_and_dtype
    case = paged_case([9, 20], [9, 40], heads=heads, head_size=16, dtype=dtype, device=device)
    assert_attention_close(attend(case), case.expected())


@pytest.mark.parametrize("head_size", [16, 80, 96, 128, 256])
def test_head_sizes_that_are_no_power_of_two(device: torch.device, head_size: int) -> None:
    case = paged_case(
        [30, 18], [35, 18], heads=(2, 1), head_size=head_size, dtype=torch.float32, device=device
    )
    assert_attention_close(attend(case), case.expected())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_tensor_core_tiles_of_every_head_size(head_size: int, dtype: torch.dtype) -> None:
    case = paged_case(
        [300, 17, 128, 1],
        [300, 517, 129, 64],
        heads=(8, 2),
        head_size=head_size,
        dtype=dtype,
        device=torch.device("cuda"),
    )
    assert_attention_close(attend(case), case.expected())


@pytest.mark.parametrize("block_size", [8, 64])
def test_other_block_sizes(device: torch.device, block_size: int) -> None:
    case = paged_case(
        [30, 33],
        [70, 33],
        heads=(2, 1),
        head_size=32,
        dtype=torch.float32,
        device=device,
        block_size=block_size,
    )
    assert_attention_close(attend(case), case.expected())


@pytest.mark.parametrize("window", [1, 16, 17, 60, 5000])
def test_a_token_sees_no_further_back_than_its_window(device: torch.device, window: int) -> None:
    case = ragged_case([40, 70, 2], [40, 180, 90], device, torch.float32)
    assert_attention_close(attend(case, window), case.expected(window))


def test_blocks_before_the_window_may_belong_to_others(device: torch.device) -> None:
    case = ragged_case([20], [200], device, torch.float32)
    window = 30
    expected = case.expected(window)
    first_seen = 200 - 20 - window + 1
    case.kv_layer[case.block_tables[0, : first_seen // 16].long()] = math.nan
    assert_attention_close(attend(case, window), expected)


def test_large_scores_do_not_overflow(device: torch.device) -> None:
    case = ragged_case([40, 7], [40, 70], device, torch.float32)
    case.query.mul_(500)
    assert_attention_close(attend(case), case.expected(), score_factor=500)


def test_padding_sequences_and_tokens_are_left_alone(device: torch.device) -> None:
    case = ragged_case([20, 5, 4], [30, 5, 4], device, torch.float32)
    out = torch.full((29, 4, 32), 7.0, device=device)
    prefill_attention(
        case.query,
        case.kv_layer,
        case.block_tables,
        torch.tensor([0, 20, 25, 25], dtype=torch.int32, device=device),
        torch.tensor([30, 5, 0], dtype=torch.int32, device=device),
        max_seqlen_q=24,
        scale=case.scale,
        out=out,
    )
    assert_attention_close(out[:25], case.expected()[:25])
    assert (out[25:] == 7.0).all()


def test_one_plan_serves_every_layer() -> None:
    case = ragged_case([20, 3], [30, 50], torch.device("cpu"), torch.float32)
    other = case.kv_layer.flip(0)
    plan = plan_prefill(
        case.block_tables,
        case.cu_seqlens_q,
        case.seq_lens,
        other,
        num_heads=4,
        sliding_window=None,
    )
    for _ in range(2):
        out = prefill_attention(
            case.query,
            case.kv_layer,
            case.block_tables,
            case.cu_seqlens_q,
            case.seq_lens,
            max_seqlen_q=20,
            scale=case.scale,
            plan=plan,
        )
        assert_attention_close(out, case.expected())


def test_an_empty_batch_gives_an_empty_result(device: torch.device) -> None:
    case = ragged_case([4], [4], device, torch.float32)
    out = prefill_attention(
        case.query[:0],
        case.kv_layer,
        case.block_tables[:0],
        case.cu_seqlens_q[:1],
        case.seq_lens[:0],
        max_seqlen_q=0,
        scale=1.0,
    )
    assert out.shape == (0, 4, 32)
