"""What one program of `row_layer` does: a warp asks for weights, the others multiply. In Gluon."""

from __future__ import annotations

from kernels.dispatch import gdc_launch_dependents, gdc_wait
from kernels.gluon_api import barrier, fence_async_shared, gl, gluon_jit, mbarrier, reinterpret
from kernels.row_input import load_units, places_of_unit, share_row
from kernels.row_peers import receive_row
from kernels.row_phases import gated_phase, plain_phase, turning_phase
from kernels.row_walk import send_all, units_of


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
def _next_epoch(epochs_ptr: gl.tensor) -> gl.tensor:
    """Of this program; 0 where there is one rank only."""
    epoch = 0
    if epochs_ptr is not None:
        epoch = gl.load(epochs_ptr + gl.program_id(0), cache_modifier=".cg") + 1
    return epoch


@gluon_jit
def _joined(
    row_ptr: gl.tensor, counter_ptr: gl.tensor, unit: gl.tensor, peers: gl.tuple,
    IN: gl.constexpr, RANK: gl.constexpr, SIZE: gl.constexpr, CAPACITY: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """The row that all programs, of all ranks, have made, unit by unit."""
    if SIZE > 1:
        return receive_row(peers[0], peers[1], unit, row_ptr, IN, RANK, SIZE, CAPACITY)
    else:
        _meet(counter_ptr)
        return load_units(row_ptr, unit, IN)


@gluon_jit
def _multiply_all(
    matrices: gl.tuple, rows: gl.tuple, norms: gl.tuple, heads: gl.tuple, counters: gl.tuple,
    walk: gl.tuple, inboxes: gl.tuple, eps: gl.tensor, ATTENDED: gl.constexpr,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, PAIRED: gl.constexpr, LAST: gl.constexpr,
    HALF: gl.constexpr, KV_HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, BITS: gl.constexpr,
    STAGES: gl.constexpr, COUNTERS: gl.constexpr, RANK: gl.constexpr, SIZE: gl.constexpr,
    CAPACITY: gl.constexpr, CHAINED: gl.constexpr,
) -> None:  # fmt: skip
    """The consumers, of one phase after the other."""
    output_scale_ptr, gate_scale_ptr, down_scale_ptr, last_scale_ptr, bias_ptr = matrices
    attended_ptr, residual_ptr, x_ptr, activated_ptr, stream_ptr, qkv_ptr = rows
    counters_ptr, idle_ptr = counters
    inboxes_ptr, epochs_ptr = inboxes
    x = walk[3]
    unit = places_of_unit(BITS)
    weights = load_units(norms[0], unit, HIDDEN)
    if CHAINED:
        gdc_wait()
    _clean(idle_ptr, COUNTERS)
    epoch = _next_epoch(epochs_ptr)
    units = load_units(attended_ptr, unit, ATTENDED)
    factor = share_row(units, (), x, eps, ATTENDED, False, BITS)
    place = (0, 0)
    place = plain_phase(
        place, factor, output_scale_ptr, None, residual_ptr, x_ptr, walk, (inboxes_ptr, epoch),
        HIDDEN, units_of(ATTENDED, BITS), STAGES, BITS, RANK, SIZE, CAPACITY,
    )  # fmt: skip
    units = _joined(x_ptr, counters_ptr, unit, (inboxes_ptr, epoch), HIDDEN, RANK, SIZE, CAPACITY)
    factor = share_row(units, weights, x, eps, HIDDEN, True, BITS)
    place = gated_phase(
        place, factor, gate_scale_ptr, activated_ptr, walk, INTER, units_of(HIDDEN, BITS), STAGES,
        BITS, PAIRED,
    )  # fmt: skip
    _meet(counters_ptr + 1)
    units = load_units(activated_ptr, unit, INTER)
    factor = share_row(units, (), x, eps, INTER, False, BITS)
    if SIZE > 1:
        epoch += 1
        gl.store(epochs_ptr + gl.program_id(0), epoch)
    inbox = (inboxes_ptr, epoch)
    place = plain_phase(
        place, factor, down_scale_ptr, None, x_ptr, stream_ptr, walk, inbox, HIDDEN,
        units_of(INTER, BITS), STAGES, BITS, RANK, SIZE, CAPACITY,
    )  # fmt: skip
    if LAST > 0:
        weights = load_units(norms[1], unit, HIDDEN)
        units = _joined(stream_ptr, counters_ptr + 2, unit, inbox, HIDDEN, RANK, SIZE, CAPACITY)
        factor = share_row(units, weights, x, eps, HIDDEN, True, BITS)
        if HALF > 0:
            turning_phase(
                place, factor, last_scale_ptr, bias_ptr, qkv_ptr, heads, walk, LAST,
                units_of(HIDDEN, BITS), HALF, KV_HEADS, BLOCK_SIZE, STAGES, BITS,
            )  # fmt: skip
        else:
            plain_phase(
                place, factor, last_scale_ptr, bias_ptr, None, qkv_ptr, walk, (), LAST,
                units_of(HIDDEN, BITS), STAGES, BITS, 0, 1, 0,
            )  # fmt: skip
    elif SIZE > 1:
        receive_row(inboxes_ptr, epoch, unit, stream_ptr, HIDDEN, RANK, SIZE, CAPACITY)


@gluon_jit
def layer_kernel(
    output_desc: gl.tensor, gate_desc: gl.tensor, down_desc: gl.tensor, last_desc: gl.tensor,
    output_scale_ptr: gl.tensor, gate_scale_ptr: gl.tensor, down_scale_ptr: gl.tensor,
    last_scale_ptr: gl.tensor, bias_ptr: gl.tensor, norm_ptr: gl.tensor, next_norm_ptr: gl.tensor,
    kv_ptr: gl.tensor, slot_ptr: gl.tensor, position_ptr: gl.tensor, cos_sin_ptr: gl.tensor,
    kv_scales_ptr: gl.tensor, attended_ptr: gl.tensor, residual_ptr: gl.tensor, x_ptr: gl.tensor,
    activated_ptr: gl.tensor, stream_ptr: gl.tensor, qkv_ptr: gl.tensor, counters_ptr: gl.tensor,
    idle_ptr: gl.tensor, inboxes_ptr: gl.tensor, epochs_ptr: gl.tensor, eps: gl.tensor,
    ATTENDED: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, PAIRED: gl.constexpr,
    LAST: gl.constexpr, HALF: gl.constexpr, KV_HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    BITS: gl.constexpr, STAGES: gl.constexpr, COUNTERS: gl.constexpr, RANK: gl.constexpr,
    SIZE: gl.constexpr, CAPACITY: gl.constexpr, CHAINED: gl.constexpr,
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
                             (counters_ptr, idle_ptr), walk, (inboxes_ptr, epochs_ptr), eps,
                             ATTENDED, HIDDEN, INTER, PAIRED, LAST, HALF, KV_HEADS, BLOCK_SIZE,
                             BITS, STAGES, COUNTERS, RANK, SIZE, CAPACITY, CHAINED)),
            (send_all, (descs, (full, free, ring), units_of(ATTENDED, BITS), HIDDEN,
                        units_of(HIDDEN, BITS), INTER, PAIRED, units_of(INTER, BITS), LAST, HALF,
                        STAGES)),
        ],
        [1],
        [24],
    )
    # fmt: on
