"""All products between one layer's attention and the next one's, for one row, as one kernel.

A decode step of one sequence is bound by reading weights, but between two kernels memory idles
until the second one has its input. Here nothing is between products but a meeting of all programs,
during which the weights behind it are already on their way (`row_walk`).

    1. Output:    x = residual + attended @ output.T
    2. Gate, up:  a = silu(g) * u of g, u = norm(x) @ gate_up.T
    3. Down:      stream = x + a @ down.T
    4. Heads of the next layer: norm(stream) @ qkv.T + bias; where that is all that stands before
       attention, they turn by their position and keys and values go to their slots (`rope_store`).

Programs meet by counting themselves in memory (`row_programs`). All must be on the GPU at the same
time, so there is one for each multiprocessor, which they fill but for what decode attention needs;
this is the one kernel that must not run beside another instance of itself.

Of a model on two GPUs each rank has its columns of output and down: x and the stream are sums over
the ranks, and the programs of both meet where they send each other their parts (`row_peers`).

The weights of the first steps are asked for before attention has ended (`chained_launch`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from kernels.dispatch import chained_launch, is_hopper, num_multiprocessors
from kernels.gluon_api import HAS_GLUON
from kernels.rope_store import rope_store
from kernels.row_programs import layer_kernel
from kernels.row_walk import TILE_OUT, WARPS, tiles_of, tiles_of_halves
from kernels.skinny_linear import skinny_linear

if TYPE_CHECKING:
    from kernels.peer_sum import PeerInboxes

_FP8 = torch.float8_e4m3fn
# Integers that one layer's programs count themselves in.
COUNTERS = 4
# Of a thread, with those of the warps that round the producer up to four.
_REGISTERS = 128
HEAD_UNIT = 16
# A program has a row of each in registers.
MOST_RANKS = 2
# Shared memory of the ring and of a row, in KiB: with decode attention's it is all there is.
_SHARED_KIB = 176


class RowMatrix(NamedTuple):
    """weight: `[N, K]`, contiguous, in bfloat16 or float16, or float8_e4m3fn with `scale` float32
    `[N]`. bias: `[N]`."""

    weight: torch.Tensor
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None


class Transform(NamedTuple):
    """What a layer does behind its attention, without biases. norm: `[hidden]`, in front of gate
    and up."""

    output: RowMatrix
    gate_up: RowMatrix
    down: RowMatrix
    norm: torch.Tensor


class Places(NamedTuple):
    """Where a row's heads go: as in `rope_store`."""

    kv_layer: torch.Tensor
    slot_mapping: torch.Tensor
    positions: torch.Tensor
    cos_sin: torch.Tensor
    kv_scales: torch.Tensor | None


class Heads(NamedTuple):
    """What the next layer does before its attention; without `places` only norm and product.

    With them heads have a multiple of HEAD_UNIT elements."""

    qkv: RowMatrix
    norm: torch.Tensor
    places: Places | None


def fits_row_layer(transform: Transform, qkv: RowMatrix, num_ranks: int = 1) -> bool:
    """Whether there is a kernel for layers of such matrices, on their device, whose products that
    many ranks sum."""
    weights = [matrix.weight for matrix in (*transform[:3], qkv)]
    device, dtype = weights[0].device, weights[0].dtype
    if not HAS_GLUON or not is_hopper(device):
        return False
    block = 128 // weights[0].itemsize
    return (
        num_ranks <= MOST_RANKS
        and dtype in (torch.bfloat16, torch.float16, _FP8)
        and all(matrix.bias is None for matrix in transform[:3])
        and all(weight.dtype == dtype and weight.is_contiguous() for weight in weights)
        and all(weight.shape[0] % 16 == 0 and weight.shape[1] % block == 0 for weight in weights)
        and _stages(dtype, [weight.shape[1] for weight in weights]) >= 4
    )


def row_layer(
    attended: torch.Tensor,
    residual: torch.Tensor,
    transform: Transform,
    heads: Heads | None,
    eps: float,
    counters: torch.Tensor,
    idle_counters: torch.Tensor,
    peers: PeerInboxes | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream behind the layer, `[1, hidden]`, and the next layer's `[1, qkv]`: of it the
    queries, if heads has places, else all; empty without heads.

    attended: `[1, query size]`. residual: `[1, hidden]`, left as it is. counters, idle_counters:
    int32 `[COUNTERS]`, apart; the former zeros, the latter become zeros. A layer that passes the
    previous call's `counters` as `idle_counters` finds its own clean for ever. peers: of a layer
    whose parts ranks have, who all make the same calls; nobody else uses these inboxes. Of
    `residual` the first rank's counts.
    """
    if attended.is_cuda:
        return _row_layer_gluon(
            attended, residual, transform, heads, eps, counters, idle_counters, peers
        )
    assert peers is None
    return _row_layer_reference(attended, residual, transform, heads, eps)


def _row_layer_reference(
    attended: torch.Tensor,
    residual: torch.Tensor,
    transform: Transform,
    heads: Heads | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    output, gate_up, down, norm = transform
    x = skinny_linear(attended, output.weight, weight_scale=output.scale, residual=residual)
    a = skinny_linear(
        x, gate_up.weight, weight_scale=gate_up.scale, norm_weight=norm, eps=eps, silu_mul=True
    )
    stream = skinny_linear(a, down.weight, weight_scale=down.scale, residual=x)
    if heads is None:
        return stream, stream.new_empty(1, 0)
    qkv = skinny_linear(
        stream, heads.qkv.weight, weight_scale=heads.qkv.scale, bias=heads.qkv.bias,
        norm_weight=heads.norm, eps=eps,
    )  # fmt: skip
    if heads.places is not None:
        kv_layer, slots, positions, cos_sin, kv_scales = heads.places
        rope_store(
            qkv, kv_layer, slots, positions, cos_sin, q_norm=None, k_norm=None, eps=eps,
            kv_scales=kv_scales, plan=None,
        )  # fmt: skip
    return stream, qkv


def _stages(dtype: torch.dtype, in_sizes: list[int]) -> int:
    """Of the ring: 16 KiB each, beside the longest row, which takes two bytes for each input."""
    unit = 1024 // dtype.itemsize
    row_bytes = 2 * unit * max(-(-size // unit) for size in in_sizes)
    return min(9, ((_SHARED_KIB << 10) - row_bytes) >> 14)


def _pairs_gates(inter: int, num_programs: int) -> bool:
    """Whether tiles of half as many gates leave less to the program that has most."""
    dealt = -(-inter // (TILE_OUT * num_programs))
    return -(-inter // (TILE_OUT // 2 * num_programs)) < 2 * dealt


def _row_layer_gluon(
    attended: torch.Tensor,
    residual: torch.Tensor,
    transform: Transform,
    heads: Heads | None,
    eps: float,
    counters: torch.Tensor,
    idle_counters: torch.Tensor,
    peers: PeerInboxes | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    output, gate_up, down, norm = transform
    hidden, inter = down.weight.shape
    following, next_norm, places = heads or Heads(down, norm, None)
    out_size = following.weight.shape[0] if heads else 0
    half, kv_heads, block_size = 0, 0, 0
    if places is not None:
        _, _, kv_heads, block_size, head_size = places.kv_layer.shape
        half = head_size // 2
    last = tiles_of_halves(following.weight, half) if half else tiles_of(following.weight)
    x, stream = torch.empty_like(residual), torch.empty_like(residual)
    activated, qkv = residual.new_empty(1, inter), residual.new_empty(1, out_size)
    in_sizes = [attended.shape[1], hidden, inter]
    chained, num_programs = chained_launch(residual.device), num_multiprocessors(residual.device)
    rank, size, capacity = (0, 1, 0) if peers is None else (peers.rank, peers.size, peers.capacity)
    assert peers is None or (hidden <= capacity and num_programs <= len(peers.epochs))
    paired = _pairs_gates(inter, num_programs)
    gates = tiles_of_halves(gate_up.weight, inter) if paired else tiles_of(gate_up.weight)
    layer_kernel[(num_programs,)](
        tiles_of(output.weight), gates, tiles_of(down.weight), last,
        output.scale, gate_up.scale, down.scale, following.scale, following.bias, norm, next_norm,
        *(places or (None,) * 5), attended, residual, x, activated, stream, qkv, counters,
        idle_counters, None if peers is None else peers.addresses,
        None if peers is None else peers.epochs, eps, ATTENDED=in_sizes[0], HIDDEN=hidden,
        INTER=inter, PAIRED=paired, LAST=out_size, HALF=half, KV_HEADS=kv_heads,
        BLOCK_SIZE=block_size, BITS=8 * down.weight.itemsize,
        STAGES=_stages(down.weight.dtype, in_sizes), COUNTERS=COUNTERS, RANK=rank, SIZE=size,
        CAPACITY=capacity, CHAINED=chained, num_warps=WARPS, maxnreg=_REGISTERS, launch_pdl=chained,
    )  # fmt: skip
    return stream, qkv
