from __future__ import annotations

import math

import pytest
import torch

from kernels.decode_plan import plan_splits
from kernels.dispatch import runs_triton
from kernels.paged_attention import paged_attention
from tests.kernels.paged import PagedCase, assert_attention_close, paged_case

Place = tuple[torch.device, torch.dtype]


def attend(case: PagedCase, sliding_window: int | None = None) -> torch.Tensor:
    out = case.poisoned_out()
    returned = paged_attention(
        case.query,
        case.kv_layer,
        case.block_tables,
        case.seq_lens,
        scale=case.scale,
        out=out,
        sliding_window=sliding_window,
    )
    assert returned is out
    return out


def decode_case(seq_lens: list[int], device: torch.device, dtype: torch.dtype) -> PagedCase:
    return paged_case(
        [1] * len(seq_lens), seq_lens, heads=(4, 2), head_size=32, dtype=dtype, device=device
    )


def test_lengths_around_block_and_tile_boundaries(product_device_and_dtype: Place) -> None:
    case = decode_case([1, 15, 16, 17, 63, 64, 65, 130], *product_device_and_dtype)
    assert_attention_close(attend(case), case.expected())


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (8, 1), (20, 1)])
def test_every_query_head_reads_its_own_kv_head(
    product_device_and_dtype: Place, heads: tuple[int, int]
) -> None:
    device, dtype = product_device_and_dtype
    case = paged_case([1, 1], [9, 40], heads=heads, head_size=16, dtype=dtype, device=device)
    assert_attention_close(attend(case), case.expected())


@pytest.mark.parametrize("head_size", [16, 80, 96, 128, 256])
def test_head_sizes_that_are_no_power_of_two(device: torch.device, head_size: int) -> None:
    case = paged_case(
        [1], [70], heads=(2, 1), head_size=head_size, dtype=torch.float32, device=device
    )
    assert_attention_close(attend(case), case.expected())


@pytest.mark.parametrize("block_size", [8, 32, 128])
def test_other_block_sizes(device: torch.device, block_size: int) -> None:
    case = paged_case(
        [1, 1],
        [70, 33],
        heads=(2, 1),
        head_size=32,
        dtype=torch.float32,
        device=device,
        block_size=block_size,
    )
    assert_attention_close(attend(case), case.expected())


@pytest.mark.parametrize("window", [1, 15, 16, 17, 64, 100, 5000])
def test_a_token_sees_no_further_back_than_its_window(device: torch.device, window: int) -> None:
    case = decode_case([5, 33, 64, 200], device, torch.float32)
    assert_attention_close(attend(case, window), case.expected(window))


def test_blocks_before_the_window_may_belong_to_others(device: torch.device) -> None:
    case = decode_case([200], device, torch.float32)
    expected = case.expected(50)
    case.kv_layer[case.block_tables[0, : (200 - 50) // 16].long()] = math.nan
    assert_attention_close(attend(case, 50), expected)


def test_split_sequences_are_combined(product_device_and_dtype: Place) -> None:
    device, dtype = product_device_and_dtype
    case = paged_case([1, 1], [900, 257], heads=(2, 1), head_size=16, dtype=dtype, device=device)
    assert_attention_close(attend(case), case.expected())


def test_large_scores_do_not_overflow(device: torch.device) -> None:
    case = decode_case([40, 300], device, torch.float32)
    case.query.mul_(500)
    assert_attention_close(attend(case), case.expected(), score_factor=500)


@pytest.mark.parametrize("longest", [17, 700])
def test_padding_rows_are_zero_and_change_nothing(device: torch.device, longest: int) -> None:
    case = decode_case([longest, 3], device, torch.float32)
    padded = PagedCase(
        query=case.query[[0, 0, 1, 1]],
        kv_layer=case.kv_layer,
        block_tables=case.block_tables[[0, 0, 1, 1]],
        cu_seqlens_q=case.cu_seqlens_q,
        seq_lens=torch.tensor([0, longest, 3, 0], dtype=torch.int32, device=device),
        dense_kv=case.dense_kv,
    )
    out = attend(padded)
    assert_attention_close(out[1:3], case.expected())
    assert out[[0, 3]].count_nonzero() == 0


def test_a_batch_of_padding_alone_is_zero(device: torch.device) -> None:
    case = decode_case([16, 16], device, torch.float32)
    case.seq_lens.zero_()
    assert attend(case).count_nonzero() == 0


def test_an_empty_batch_gives_an_empty_result(device: torch.device) -> None:
    case = decode_case([4], device, torch.float32)
    out = paged_attention(
        case.query[:0], case.kv_layer, case.block_tables[:0], case.seq_lens[:0], scale=1.0
    )
    assert out.shape == (0, 4, 32)


def test_many_sequences_of_all_lengths(device: torch.device) -> None:
    case = decode_case([1 + 7 * i % 90 for i in range(24)], device, torch.float32)
    assert_attention_close(attend(case), case.expected())


@pytest.mark.parametrize("num_short", [2, 30])
def test_cut_sequences_are_found_among_few_and_among_many(
    product_device_and_dtype: Place, num_short: int
) -> None:
    lengths = [700, *[5] * num_short, 1500, 64]
    case = decode_case(lengths, *product_device_and_dtype)
    assert_attention_close(attend(case), case.expected())


@pytest.mark.parametrize("window", [None, 90])
def test_one_long_sequence_among_short_ones_is_cut_and_put_together(
    product_device_and_dtype: Place, window: int | None
) -> None:
    lengths = [40, 3, 1800, 17, 64, 0, 65, 900]
    case = decode_case([max(1, length) for length in lengths], *product_device_and_dtype)
    case.seq_lens[5] = 0
    expected = case.expected(window)
    expected[5] = 0
    assert_attention_close(attend(case, window), expected)


def test_a_plan_serves_every_layer_of_its_shape(device: torch.device) -> None:
    layers = [decode_case([300, 17, 1200], device, torch.float32) for _ in range(2)]
    if not runs_triton(layers[0].query):
        pytest.skip("the CPU has a plan of its own")
    plan = plan_splits(layers[0].seq_lens, layers[0].kv_layer, sliding_window=None)
    for case in layers:
        out = paged_attention(
            case.query, case.kv_layer, case.block_tables, case.seq_lens, scale=case.scale,
            out=case.poisoned_out(), plan=plan,
        )  # fmt: skip
        assert_attention_close(out, case.expected())


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 8), (8, 8), (16, 1), (40, 2)])
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_long_sequences_on_a_whole_gpu(heads: tuple[int, int], head_size: int) -> None:
    case = paged_case(
        [1] * 5,
        [1, 9000, 64, 700, 20_000],
        heads=heads,
        head_size=head_size,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    assert_attention_close(attend(case), case.expected())


@pytest.mark.gpu
def test_the_same_inputs_give_the_same_bits() -> None:
    case = paged_case(
        [1] * 3,
        [30_000, 5, 700],
        heads=(8, 2),
        head_size=128,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    first = attend(case)
    assert all(torch.equal(attend(case), first) for _ in range(20))


@pytest.mark.gpu
def test_a_captured_graph_follows_new_lengths_and_blocks() -> None:
    device = torch.device("cuda")
    first = decode_case([700, 30, 1], device, torch.bfloat16)
    second = decode_case([12, 500, 699], device, torch.bfloat16)
    query, tables, lens = first.query.clone(), first.block_tables.clone(), first.seq_lens.clone()
    pool = torch.cat((first.kv_layer, second.kv_layer))
    out = torch.empty_like(query)

    def run() -> None:
        paged_attention(query, pool, tables, lens, scale=first.scale, out=out)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    query.copy_(second.query)
    lens.copy_(second.seq_lens)
    tables.copy_(second.block_tables + len(first.kv_layer))
    graph.replay()
    assert_attention_close(out, second.expected())


@pytest.mark.gpu
def test_a_pool_of_more_than_two_to_the_31_elements() -> None:
    device = torch.device("cuda")
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of GPU memory")
    case = paged_case([1], [40], heads=(8, 8), head_size=128, dtype=torch.bfloat16, device=device)
    num_blocks = (1 << 31) // case.kv_layer[0].numel() + 8
    pool = torch.empty((num_blocks, *case.kv_layer.shape[1:]), dtype=torch.bfloat16, device=device)
    used = case.block_tables[0, :3].long()
    moved = torch.arange(num_blocks - 3, num_blocks, device=device)
    pool[moved] = case.kv_layer[used]
    tables = case.block_tables.clone()
    tables[0, :3] = moved.int()
    out = paged_attention(case.query, pool, tables, case.seq_lens, scale=case.scale)
    assert_attention_close(out, case.expected())
