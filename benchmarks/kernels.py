"""`python -m benchmarks.kernels`: what every kernel takes on a GPU, beside what the GPU can do.

1. Inputs are random normal, in the shapes of Llama-3.1-8B (32 query heads, 8 KV heads of 128,
   bfloat16, blocks of 16 tokens), block tables scrambled.
2. A figure is the median time of a CUDA graph of many calls, divided by their number. The calls
   take turns over copies of the inputs that together exceed the second-level cache.
3. Bytes are those that must move (each operand once), shown as a share of the rate of a large copy
   measured in the same run; prefill attention's floating-point operations as a share of the rate of
   a large matrix product. cuDNN's attention over contiguous tensors is timed as the opponent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels.block_digest import block_digests
from kernels.copy_blocks import pack_blocks, unpack_blocks
from kernels.paged_attention import paged_attention
from kernels.prefill_attention import prefill_attention
from kernels.rms_norm import rms_norm
from kernels.rotary import apply_rotary
from kernels.silu_mul import silu_mul
from kernels.store_kv import store_kv
from loadtest.metadata import collect_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
HIDDEN, INTERMEDIATE = 4096, 14336
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda")
KV_TOKEN_BYTES = 2 * KV_HEADS * HEAD_SIZE * 2

CACHE_BYTES = 128 << 20
MAX_COPIES = 32
MATMUL_COPIES = 4
REPLAYS = 25


@dataclass(frozen=True, slots=True)
class Case:
    """One figure. `make` allocates one set of inputs and returns the call to time."""

    name: str
    make: Callable[[], Callable[[], object]]
    num_bytes: int = 0
    num_flops: int = 0


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    microseconds: float
    gigabytes_per_second: float
    share_of_copy: float
    teraflops: float
    share_of_matmul: float


def median_seconds(case: Case) -> float:
    """Seconds of one call."""
    copies = MATMUL_COPIES
    if case.num_bytes:
        copies = min(MAX_COPIES, max(1, CACHE_BYTES // case.num_bytes))
    calls = [case.make() for _ in range(copies)]
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    samples: list[float] = []
    start, stop = (torch.Event("cuda", enable_timing=True) for _ in range(2))
    for _ in range(REPLAYS):
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) / 1e3 / copies)
    return statistics.median(samples)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def copy_case(num_bytes: int) -> Case:
    def make() -> Callable[[], object]:
        source = normal(num_bytes // 2)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return Case("copy (torch)", make, num_bytes=2 * num_bytes)


def matmul_case(size: int) -> Case:
    def make() -> Callable[[], object]:
        a, b = normal(size, size), normal(size, size)
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)

    return Case(f"matmul {size}^3 (torch)", make, num_flops=2 * size**3)


def paged_kv(seq_lens: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A pool with scrambled blocks, block tables and lengths."""
    counts = [-(-length // BLOCK_SIZE) for length in seq_lens]
    kv_layer = normal(sum(counts), 2, KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
    blocks = torch.randperm(sum(counts), dtype=torch.int32)
    tables = torch.zeros(len(seq_lens), max(counts), dtype=torch.int32)
    for row, part in enumerate(torch.split_with_sizes(blocks, counts)):
        tables[row, : len(part)] = part
    lengths = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
    return kv_layer, tables.to(DEVICE), lengths


def decode_case(name: str, seq_lens: list[int]) -> Case:
    def make() -> Callable[[], object]:
        kv_layer, tables, lengths = paged_kv(seq_lens)
        query = normal(len(seq_lens), HEADS, HEAD_SIZE)
        out = torch.empty_like(query)
        scale = HEAD_SIZE**-0.5
        return lambda: paged_attention(query, kv_layer, tables, lengths, scale=scale, out=out)

    return Case(f"paged_attention {name}", make, num_bytes=sum(seq_lens) * KV_TOKEN_BYTES)


def attention_flops(num_tokens: int, prefix: int) -> int:
    pairs = num_tokens * prefix + num_tokens * (num_tokens + 1) // 2
    return 4 * HEADS * HEAD_SIZE * pairs


def prefill_case(num_tokens: int, prefix: int, num_seqs: int = 1) -> Case:
    def make() -> Callable[[], object]:
        kv_layer, tables, lengths = paged_kv([prefix + num_tokens] * num_seqs)
        query = normal(num_tokens * num_seqs, HEADS, HEAD_SIZE)
        starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=DEVICE) * num_tokens
        out = torch.empty_like(query)
        return lambda: prefill_attention(
            query,
            kv_layer,
            tables,
            starts,
            lengths,
            max_seqlen_q=num_tokens,
            scale=HEAD_SIZE**-0.5,
            out=out,
        )

    name = f"prefill_attention {num_seqs} x {num_tokens} after {prefix}"
    return Case(name, make, num_flops=num_seqs * attention_flops(num_tokens, prefix))


def cudnn_case(num_tokens: int) -> Case:
    def make() -> Callable[[], object]:
        query = normal(1, HEADS, num_tokens, HEAD_SIZE)
        key, value = (normal(1, KV_HEADS, num_tokens, HEAD_SIZE) for _ in range(2))

        def call() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=True
                )

        return call

    name = f"cuDNN attention 1 x {num_tokens}, contiguous"
    return Case(name, make, num_flops=attention_flops(num_tokens, 0))


def token_cases(num_tokens: int) -> Iterator[Case]:
    """The kernels that work token by token."""
    heads = HEADS + 2 * KV_HEADS
    positions = torch.randint(0, 4096, (num_tokens,), device=DEVICE)
    cos_sin = torch.randn(4096, HEAD_SIZE, device=DEVICE)
    num_slots = max(1, 4 * num_tokens // BLOCK_SIZE) * BLOCK_SIZE
    slots = torch.randperm(num_slots)[:num_tokens].to(DEVICE)

    def norm() -> Callable[[], object]:
        x, residual, weight = (
            normal(num_tokens, HIDDEN),
            normal(num_tokens, HIDDEN),
            normal(HIDDEN),
        )
        return lambda: rms_norm(x, weight, 1e-5, residual=residual)

    def rotary() -> Callable[[], object]:
        qkv = normal(num_tokens, heads, HEAD_SIZE)
        query, key = qkv[:, :HEADS], qkv[:, HEADS : HEADS + KV_HEADS]
        return lambda: apply_rotary(query, key, positions, cos_sin)

    def store() -> Callable[[], object]:
        qkv = normal(num_tokens, heads, HEAD_SIZE)
        key, value = qkv[:, HEADS : HEADS + KV_HEADS], qkv[:, HEADS + KV_HEADS :]
        num_blocks = max(1, 4 * num_tokens // BLOCK_SIZE)
        kv_layer = normal(num_blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
        return lambda: store_kv(key, value, kv_layer, slots)

    def silu() -> Callable[[], object]:
        gate_up = normal(num_tokens, 2 * INTERMEDIATE)
        return lambda: silu_mul(gate_up)

    row = 2 * num_tokens
    suffix = f"{num_tokens} tokens"
    yield Case(f"rms_norm with residual, {suffix}", norm, num_bytes=4 * HIDDEN * row)
    yield Case(f"rotary, {suffix}", rotary, num_bytes=2 * (HEADS + KV_HEADS) * HEAD_SIZE * row)
    yield Case(f"store_kv, {suffix}", store, num_bytes=2 * KV_TOKEN_BYTES * num_tokens)
    yield Case(f"silu_mul, {suffix}", silu, num_bytes=3 * INTERMEDIATE * row)


def block_cases(num_layers: int, num_ids: int) -> Iterator[Case]:
    """The kernels of the hand-off, over a pool four times as large as what is moved."""
    unit = KV_TOKEN_BYTES * BLOCK_SIZE
    packed_bytes = num_layers * num_ids * unit

    def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pool = normal(num_layers, 4 * num_ids, unit // 2).view(torch.uint8)
        packed = normal(num_layers, num_ids, unit // 2).view(torch.uint8)
        return pool, packed, torch.randperm(4 * num_ids)[:num_ids].to(DEVICE)

    def pack() -> Callable[[], object]:
        pool, packed, ids = inputs()
        return lambda: pack_blocks(pool, 0, num_layers, ids, packed)

    def unpack() -> Callable[[], object]:
        pool, packed, ids = inputs()
        return lambda: unpack_blocks(packed, pool, 0, num_layers, ids)

    def digest() -> Callable[[], object]:
        _, packed, _ = inputs()
        return lambda: block_digests(packed, num_layers * num_ids)

    suffix = f"{packed_bytes >> 20} MiB"
    yield Case(f"pack_blocks, {suffix}", pack, num_bytes=2 * packed_bytes)
    yield Case(f"unpack_blocks, {suffix}", unpack, num_bytes=2 * packed_bytes)
    yield Case(f"block_digests, {suffix}", digest, num_bytes=packed_bytes)


def cases() -> Iterator[Case]:
    yield decode_case("64 x 4096", [4096] * 64)
    yield decode_case("8 x 32768", [32768] * 8)
    yield decode_case("1 x 131072", [131072])
    yield decode_case("1 x 131072 + 31 x 4096", [131072] + [4096] * 31)
    yield decode_case("32 x 8064, the same bytes", [8064] * 32)
    yield decode_case("64 x 512", [512] * 64)
    for num_tokens in (2048, 8192, 32768):
        yield prefill_case(num_tokens, 0)
        yield cudnn_case(num_tokens)
    yield prefill_case(2048, 0, num_seqs=4)
    yield prefill_case(2048, 30720)
    yield prefill_case(64, 8192)
    for num_tokens in (8192, 64, 1):
        yield from token_cases(num_tokens)
    yield from block_cases(4, 512)
    yield from block_cases(1, 128)


def figure(case: Case, copy_rate: float, matmul_rate: float) -> Figure:
    """Rates in bytes and floating-point operations per second."""
    seconds = median_seconds(case)
    byte_rate, flop_rate = case.num_bytes / seconds, case.num_flops / seconds
    return Figure(
        name=case.name,
        microseconds=seconds * 1e6,
        gigabytes_per_second=byte_rate / 1e9,
        share_of_copy=byte_rate / copy_rate,
        teraflops=flop_rate / 1e12,
        share_of_matmul=flop_rate / matmul_rate,
    )


def line(result: Figure) -> str:
    if result.teraflops:
        rate = f"{result.teraflops:8.0f} TFLOP/s {result.share_of_matmul:6.1%} of matmul"
    else:
        rate = f"{result.gigabytes_per_second:8.0f} GB/s    {result.share_of_copy:6.1%} of copy"
    return f"{result.name:48s} {result.microseconds:10.1f} us {rate}"


def run(only: str) -> list[Figure]:
    torch.manual_seed(0)
    ceilings = copy_case(1 << 30), matmul_case(8192)
    copy_rate = ceilings[0].num_bytes / median_seconds(ceilings[0])
    matmul_rate = ceilings[1].num_flops / median_seconds(ceilings[1])
    results = []
    for case in (*ceilings, *cases()):
        if case in ceilings or only in case.name:
            results.append(figure(case, copy_rate, matmul_rate))
            print(line(results[-1]), flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="Times every kernel on a GPU.")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU found; these figures need one", file=sys.stderr)
        return 1
    metadata = collect_metadata().as_dict()
    print(json.dumps(metadata, indent=1), flush=True)
    figures = [asdict(result) for result in run(arguments.only)]
    if arguments.json:
        arguments.json.write_text(json.dumps({"metadata": metadata, "figures": figures}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
