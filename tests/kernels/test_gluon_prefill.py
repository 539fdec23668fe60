"""The Gluon kernel compiles without a GPU, but runs on Hopper GPUs only."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from kernels.gluon_prefill import gluon_prefill, kv_heads_at_a_time
from kernels.prefill_attention import prefill_attention
from kernels.prefill_tiles import plan_tiles
from tests.kernels.paged import PagedCase, assert_attention_close, paged_case

if TYPE_CHECKING:
    from kernels.attention_backend import AttentionBackend


# Compiles for a GPU that need not be there; a process of its own, for Triton's interpreter may be
# on in this one.
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from kernels import gluon_prefill

head_size, page, window = map(int, sys.argv[1:])
layout = gl.NVMMASharedLayout(128, 16, rank=2)
types = dict.fromkeys(("tables_ptr", "tiles_ptr"), "*i32") | {
    "queries": f"tensordesc<bf16[64, 64],{layout!r}>",
    "pool": f"tensordesc<bf16[{page}, 64],{layout!r}>",
    "out_ptr": "*bf16",
    "table_stride": "i32",
    "outside": "i32",
    "section": "i32",
    "scale_log2": "fp32",
}
constants = {"HEADS": 8, "KV_HEADS": 2, "HEAD_SIZE": head_size, "PAGE": page, "TILE": 128}
constants |= {"ROWS": 128, "KEY_STAGES": gluon_prefill._KEY_STAGES, "WINDOW": window}
constants["VALUE_STAGES"] = gluon_prefill._VALUE_STAGES
constants["QUERY_STAGES"] = gluon_prefill._QUERY_STAGES
kernel = gluon_prefill._prefill_kernel
names = kernel.arg_names
source = GluonASTSource(
    kernel,
    {name: types.get(name, "constexpr") for name in names},
    {(names.index(name),): value for name, value in constants.items()},
)
target = GPUTarget("cuda", 90, 32)
compiled = triton.compile(source, target=target, options={"num_warps": 4, "maxnreg": 168})
counts = [compiled.asm["ptx"].count(name) for name in sys.stdin.read().split()]
print(compiled.metadata.shared, *counts)
"""


@pytest.mark.parametrize(("head_size", "page", "window"), [(128, 16, 0), (64, 128, 50)])
def test_it_compiles_for_hopper_anywhere(head_size: int, page: int, window: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(head_size), str(page), str(window)],
        input="wgmma.mma_async cp.async.bulk.tensor setmaxnreg.inc",
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shared_bytes, *counts = map(int, done.stdout.split())
    assert shared_bytes <= 227 << 10
    assert all(counts), "tensor cores, memory accelerator and registers are used"


@pytest.mark.parametrize(("length", "heads"), [(100, 8), (2048, 8), (8192, 4), (32768, 1)])
def test_as_many_kv_heads_at_a_time_as_the_cache_holds(length: int, heads: int) -> None:
    assert kv_heads_at_a_time(8, length * 128) == heads


def test_kv_heads_at_a_time_divide_all() -> None:
    for length in range(1, 60_000, 501):
        assert 6 % kv_heads_at_a_time(6, length * 64) == 0


def cuda_case(
    query_lens: list[int],
    seq_lens: list[int],
    heads: tuple[int, int] = (8, 2),
    head_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 16,
    is_float8: bool = False,
) -> PagedCase:
    device = torch.device("cuda")
    return paged_case(
        query_lens,
        seq_lens,
        heads=heads,
        head_size=head_size,
        dtype=dtype,
        device=device,
        block_size=block_size,
        is_float8=is_float8,
    )


def attend(case: PagedCase, sliding_window: int | None = None) -> torch.Tensor:
    tiles = plan_tiles(case.cu_seqlens_q, case.seq_lens, len(case.query))
    out = case.poisoned_out()
    gluon_prefill(
        case.query,
        case.kv_layer,
        case.block_tables,
        tiles,
        max_seqlen_q=int(case.cu_seqlens_q.diff().max()),
        scale=case.scale,
        out=out,
        sliding_window=sliding_window,
    )
    assert tiles[0, 1] == 0, "the counter is ready for the next layer"
    return out


def assert_right(case: PagedCase, sliding_window: int | None = None) -> None:
    assert_attention_close(attend(case, sliding_window), case.expected(sliding_window))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [64, 128])
def test_ragged_prompts_and_chunks_after_prefixes(head_size: int, dtype: torch.dtype) -> None:
    query_lens, seq_lens = [300, 17, 128, 1, 129, 64], [300, 517, 129, 64, 130, 1064]
    assert_right(cuda_case(query_lens, seq_lens, head_size=head_size, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("prefix", [1, 16, 37, 64, 127, 128, 129, 150, 1000])
def test_prefixes_that_are_no_multiple_of_a_tile(prefix: int) -> None:
    assert_right(cuda_case([150, 20], [150 + prefix, 20 + prefix]))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8])
def test_query_heads_share_kv_heads_in_groups(group: int) -> None:
    assert_right(cuda_case([70, 200], [90, 333], heads=(2 * group, 2)))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("block_size", [8, 32, 64, 128])
def test_other_block_sizes(block_size: int) -> None:
    assert_right(cuda_case([130, 33], [270, 33], block_size=block_size))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("window", [1, 16, 17, 60, 128, 300, 5000])
def test_a_token_sees_no_further_back_than_its_window(window: int) -> None:
    assert_right(cuda_case([140, 70, 2], [140, 680, 90]), window)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_blocks_before_the_window_may_belong_to_others() -> None:
    case = cuda_case([20], [600])
    window = 30
    expected = case.expected(window)
    first_seen = 600 - 20 - window + 1
    case.kv_layer[case.block_tables[0, : first_seen // 16].long()] = math.nan
    assert_attention_close(attend(case, window), expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_weights_that_grow_along_the_sequence_do_not_overflow() -> None:
    case = cuda_case([700], [900], dtype=torch.float16)
    keys = case.dense_kv[0][0]
    # Every token's key points the way of all queries, more so the later it is.
    keys.copy_((case.query[-1, 0].cpu().double() * torch.linspace(-3, 3, 900)[:, None]).half())
    blocks = case.block_tables[0, : -(-900 // 16)].long()
    padded = torch.nn.functional.pad(keys, (0, 0, 0, 12)).half().to("cuda")
    case.kv_layer[blocks, 0] = padded.view(2, -1, 16, 128).transpose(0, 1)
    case.query[:] = case.query[-1:, :1]
    assert_right(case)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_more_pieces_than_thread_blocks_in_every_order() -> None:
    assert_right(cuda_case([1000, 3, 900, 400], [1000, 503, 1300, 2400], heads=(16, 2)))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_short_prompts_of_a_large_batch() -> None:
    lengths = torch.randint(1, 200, (70,)).tolist()
    assert_right(cuda_case(lengths, lengths))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_one_plan_serves_every_layer_and_calls_repeat_exactly() -> None:
    case = cuda_case([300, 40], [300, 900])
    tiles = plan_tiles(case.cu_seqlens_q, case.seq_lens, 340)
    results = [
        prefill_attention(
            case.query,
            case.kv_layer,
            case.block_tables,
            case.cu_seqlens_q,
            case.seq_lens,
            max_seqlen_q=300,
            scale=case.scale,
            out=case.poisoned_out(),
            plan=tiles,
            backend="gluon",
        )
        for _ in range(3)
    ]
    assert_attention_close(results[0], case.expected())
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_it_can_be_captured_in_a_graph() -> None:
    case = cuda_case([300, 40], [300, 900])
    out = attend(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = prefill_attention(
            case.query,
            case.kv_layer,
            case.block_tables,
            case.cu_seqlens_q,
            case.seq_lens,
            max_seqlen_q=300,
            scale=case.scale,
            backend="gluon",
        )
    for _ in range(2):
        captured.fill_(math.nan)
        graph.replay()
        assert torch.equal(captured, out)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("backend", ["triton", "gluon"])
@pytest.mark.parametrize("window", [None, 50])
def test_float8_kv_is_multiplied_by_its_scales(
    backend: AttentionBackend, window: int | None
) -> None:
    case = cuda_case([300, 17, 128], [300, 517, 429], is_float8=True)
    out = prefill_attention(
        case.query,
        case.kv_layer,
        case.block_tables,
        case.cu_seqlens_q,
        case.seq_lens,
        max_seqlen_q=300,
        scale=case.scale,
        out=case.poisoned_out(),
        sliding_window=window,
        kv_scales=case.kv_scales,
        backend=backend,
    )
    assert_attention_close(out, case.expected(window))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_padding_sequences_and_tokens_are_left_alone() -> None:
    case = cuda_case([200, 5, 4], [300, 5, 4])
    out = torch.full_like(case.query, 7.0, memory_format=torch.contiguous_format)
    prefill_attention(
        case.query,
        case.kv_layer,
        case.block_tables,
        torch.tensor([0, 200, 205, 205], dtype=torch.int32, device="cuda"),
        torch.tensor([300, 5, 0], dtype=torch.int32, device="cuda"),
        max_seqlen_q=256,
        scale=case.scale,
        out=out,
        backend="gluon",
    )
    assert_attention_close(out[:205], case.expected()[:205])
    assert (out[205:] == 7.0).all()
