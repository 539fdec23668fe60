"""All products between one layer's attention and the next one's, for one row, as one kernel.

A decode step of one sequence is bound by reading weights, but between two kernels memory idles
until the second one has its input. Here nothing is between products but a meeting of all programs,
during which the weights behind it are already on their way (`row_walk`).

    1. Output:    x = residual + attended @ output.T
    2. Gate, up:  a = silu(g) * u of g, u = norm(x) @ gate_up.T
    3. Down:      stream = x + a @ down.T
    4. Heads of the next layer: norm(stream) @ qkv.T + bias; where that is all that stands before
       attention, they turn by their position and keys and values go to their slots (`rope_store`).

Programs meet by counting themselves in memory. All must be on the GPU at the same time, so there is
one for each multiprocessor, which they fill but for what decode attention needs; this is the one
kernel that must not run beside another instance of itself.

The weights of the first steps are asked for before attention has ended (`chained_launch`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.dispatch import chained_launch, gdc_launch_dependents, gdc_wait, num_multiprocessors
from kernels.gluon_api import (
    HAS_GLUON,
    barrier,
    fence_async_shared,
    gl,
    gluon_jit,
    mbarrier,
    reinterpret,
)
from kernels.rope_store import rope_store
from kernels.row_input import load_units, places_of_unit, share_row
from kernels.row_phases import gated_phase, plain_phase, turning_phase
from kernels.row_walk import WARPS, send_all, tiles_of, tiles_of_heads, units_of
from kernels.skinny_linear import skinny_linear

_FP8 = torch.float8_e4m3fn
# Integers that one layer's programs count themselves in.
COUNTERS = 4
# Of a thread, with those of the warps that round the producer up to four.
_REGISTERS = 128
HEAD_UNIT = 16
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


def fits_row_layer(transform: Transform, qkv: RowMatrix) -> bool:
    """Whether there is a kernel for layers of such matrices, on their device."""
    weights = [matrix.weight for matrix in (*transform[:3], qkv)]
    device, dtype = weights[0].device, weights[0].dtype
    if not HAS_GLUON or device.type != "cuda":
        return False
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    block = 128 // weights[0].itemsize
    return (
        dtype in (torch.bfloat16, torch.float16, _FP8)
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream behind the layer, `[1, hidden]`, and the next layer's `[1, qkv]`: of it the
    queries, if heads has places, else all; empty without heads.

    attended: `[1, query size]`. residual: `[1, hidden]`, left as it is. counters, idle_counters:
    int32 `[COUNTERS]`, apart; the former zeros, the latter become zeros. A layer that passes the
    previous call's `counters` as `idle_counters` finds its own clean for ever.
    """
    if attended.is_cuda:
        return _row_layer_gluon(attended, residual, transform, heads, eps, counters, idle_counters)
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


def _row_layer_gluon(
    attended: torch.Tensor,
    residual: torch.Tensor,
    transform: Transform,
    heads: Heads | None,
    eps: float,
    counters: torch.Tensor,
    idle_counters: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    output, gate_up, down, norm = transform
    hidden, inter = down.weight.shape
    following, next_norm, places = heads or Heads(down, norm, None)
    out_size = following.weight.shape[0] if heads else 0
    half, kv_heads, block_size = 0, 0, 0
    if places is not None:
        _, _, kv_heads, block_size, head_size = places.kv_layer.shape
        half = head_size // 2
    last = tiles_of_heads(following.weight, half) if half else tiles_of(following.weight)
    x, stream = torch.empty_like(residual), torch.empty_like(residual)
    activated, qkv = residual.new_empty(1, inter), residual.new_empty(1, out_size)
    in_sizes = [attended.shape[1], hidden, inter]
    chained = chained_launch(residual.device)
    _layer_kernel[(num_multiprocessors(residual.device),)](
        tiles_of(output.weight), tiles_of(gate_up.weight), tiles_of(down.weight), last,
        output.scale, gate_up.scale, down.scale, following.scale, following.bias, norm, next_norm,
        *(places or (None,) * 5), attended, residual, x, activated, stream, qkv, counters,
        idle_counters, eps, ATTENDED=in_sizes[0], HIDDEN=hidden, INTER=inter, LAST=out_size,
        HALF=half, KV_HEADS=kv_heads, BLOCK_SIZE=block_size, BITS=8 * down.weight.itemsize,
        STAGES=_stages(down.weight.dtype, in_sizes), COUNTERS=COUNTERS,
        CHAINED=chained, num_warps=WARPS, maxnreg=_REGISTERS, launch_pdl=chained,
    )  # fmt: skip
    return stream, qkv


@gluon_jit
def _meet(counter_ptr: gl.tensor) -> None:
    """Wait until all programs are here; what they have written can be read then."""
    barrier()
    gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    SAME: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    ptrs = counter_ptr + gl.zeros([1], gl.int32, SAME)
    arrived = gl.sum(_arrived(ptrs), axis=0)
    while arrived < gl.num_programs(0):
        arrived = gl.sum(_arrived(ptrs), axis=0)
    barrier()


@gluon_jit
def _arrived(ptrs: gl.tensor) -> gl.tensor:
    """What the first thread finds there; many for all others, who would be in each other's way."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .b32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        mov.b32 $0, 0x7FFFFFFF;
        @first ld.acquire.gpu.global.b32 $0, [$1];
        }""",
        "=&r,l", [ptrs], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon_jit
def _clean(counters_ptr: gl.tensor, COUNTERS: gl.constexpr) -> None:
    if gl.program_id(0) == 0:
        counter = gl.arange(0, COUNTERS, gl.BlockedLayout([1], [32], [8], [0]))
        gl.store(counters_ptr + counter, 0 * counter)


@gluon_jit
def _multiply_all(
    matrices: gl.tuple, rows: gl.tuple, norms: gl.tuple, heads: gl.tuple, counters: gl.tuple,
    walk: gl.tuple, eps: gl.tensor, ATTENDED: gl.constexpr, HIDDEN: gl.constexpr,
    INTER: gl.constexpr, LAST: gl.constexpr, HALF: gl.constexpr, KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, BITS: gl.constexpr, STAGES: gl.constexpr, COUNTERS: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:  # fmt: skip
    """The consumers, of one phase after the other."""
    output_scale_ptr, gate_scale_ptr, down_scale_ptr, last_scale_ptr, bias_ptr = matrices
    attended_ptr, residual_ptr, x_ptr, activated_ptr, stream_ptr, qkv_ptr = rows
    counters_ptr, idle_ptr = counters
    x = walk[3]
    unit = places_of_unit(BITS)
    weights = load_units(norms[0], unit, HIDDEN)
    if CHAINED:
        gdc_wait()
    _clean(idle_ptr, COUNTERS)
    units = load_units(attended_ptr, unit, ATTENDED)
    factor = share_row(units, (), x, eps, ATTENDED, False, BITS)
    place = (0, 0)
    place = plain_phase(
        place, factor, output_scale_ptr, None, residual_ptr, x_ptr, walk, HIDDEN,
        units_of(ATTENDED, BITS), STAGES, BITS,
    )  # fmt: skip
    _meet(counters_ptr)
    factor = share_row(load_units(x_ptr, unit, HIDDEN), weights, x, eps, HIDDEN, True, BITS)
    place = gated_phase(
        place, factor, gate_scale_ptr, activated_ptr, walk, INTER, units_of(HIDDEN, BITS), STAGES,
        BITS,
    )  # fmt: skip
    _meet(counters_ptr + 1)
    units = load_units(activated_ptr, unit, INTER)
    factor = share_row(units, (), x, eps, INTER, False, BITS)
    place = plain_phase(
        place, factor, down_scale_ptr, None, x_ptr, stream_ptr, walk, HIDDEN,
        units_of(INTER, BITS), STAGES, BITS,
    )  # fmt: skip
    if LAST > 0:
        weights = load_units(norms[1], unit, HIDDEN)
        _meet(counters_ptr + 2)
        units = load_units(stream_ptr, unit, HIDDEN)
        factor = share_row(units, weights, x, eps, HIDDEN, True, BITS)
        if HALF > 0:
            turning_phase(
                place, factor, last_scale_ptr, bias_ptr, qkv_ptr, heads, walk, LAST,
                units_of(HIDDEN, BITS), HALF, KV_HEADS, BLOCK_SIZE, STAGES, BITS,
            )  # fmt: skip
        else:
            plain_phase(
                place, factor, last_scale_ptr, bias_ptr, None, qkv_ptr, walk, LAST,
                units_of(HIDDEN, BITS), STAGES, BITS,
            )  # fmt: skip


@gluon_jit
def _layer_kernel(
    output_desc: gl.tensor, gate_desc: gl.tensor, down_desc: gl.tensor, last_desc: gl.tensor,
    output_scale_ptr: gl.tensor, gate_scale_ptr: gl.tensor, down_scale_ptr: gl.tensor,
    last_scale_ptr: gl.tensor, bias_ptr: gl.tensor, norm_ptr: gl.tensor, next_norm_ptr: gl.tensor,
    kv_ptr: gl.tensor, slot_ptr: gl.tensor, position_ptr: gl.tensor, cos_sin_ptr: gl.tensor,
    kv_scales_ptr: gl.tensor, attended_ptr: gl.tensor, residual_ptr: gl.tensor, x_ptr: gl.tensor,
    activated_ptr: gl.tensor, stream_ptr: gl.tensor, qkv_ptr: gl.tensor, counters_ptr: gl.tensor,
    idle_ptr: gl.tensor, eps: gl.tensor, ATTENDED: gl.constexpr, HIDDEN: gl.constexpr,
    INTER: gl.constexpr, LAST: gl.constexpr, HALF: gl.constexpr, KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, BITS: gl.constexpr, STAGES: gl.constexpr, COUNTERS: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:  # fmt: skip
    if CHAINED:
        gdc_launch_dependents()
    INPUTS: gl.constexpr = 1024 // BITS
    TYPE: gl.constexpr = down_desc.dtype
    ROWS: gl.constexpr = gl.NVMMASharedLayout(128, BITS, 2)
    LONGEST: gl.constexpr = units_of(max(ATTENDED, HIDDEN, INTER), BITS)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ring = gl.allocate_shared_memory(TYPE, [STAGES, 8, 16, INPUTS], down_desc.layout)
    row = gl.allocate_shared_memory(TYPE, [LONGEST, 128 // BITS, INPUTS], ROWS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()
    descs = (output_desc, gate_desc, down_desc, last_desc)
    scales = (output_scale_ptr, gate_scale_ptr, down_scale_ptr, last_scale_ptr, bias_ptr)
    rows = (attended_ptr, residual_ptr, x_ptr, activated_ptr, stream_ptr, qkv_ptr)
    heads = (kv_ptr, slot_ptr, position_ptr, cos_sin_ptr, kv_scales_ptr)
    walk = (full, free, reinterpret(ring, TYPE, [STAGES, 128, INPUTS], ROWS), row)
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply_all, (scales, rows, (norm_ptr, next_norm_ptr), heads,
                             (counters_ptr, idle_ptr), walk, eps, ATTENDED, HIDDEN, INTER, LAST,
                             HALF, KV_HEADS, BLOCK_SIZE, BITS, STAGES, COUNTERS, CHAINED)),
            (send_all, (descs, (full, free, ring), units_of(ATTENDED, BITS), HIDDEN,
                        units_of(HIDDEN, BITS), INTER, units_of(INTER, BITS), LAST, HALF, STAGES)),
        ],
        [1],
        [24],
    )
    # fmt: on
