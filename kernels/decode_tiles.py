"""What decode attention reads: the query, and tiles of keys and values, float8 as pairs of columns.
For `split_attention`."""

from __future__ import annotations

from typing import Any

from kernels.dispatch import jit, tl


@jit
def _columns(pairs: tl.tensor, COMPILED: tl.constexpr) -> Any:
    """The even and the odd columns of float8 pairs (int16), as float16."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted;
            .reg .b16 even, odd;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {even, odd}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, even;
            cvt.rn.f16x2.e4m3x2 $1, odd;
            }""",
            "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    even, odd = (pairs & 0xFF).to(tl.uint8), ((pairs >> 8) & 0xFF).to(tl.uint8)
    even, odd = even.to(tl.float8e4nv, bitcast=True), odd.to(tl.float8e4nv, bitcast=True)
    return even.to(tl.float16), odd.to(tl.float16)


@jit
def prefetch(
    head_ptr: tl.tensor, table_ptr: tl.tensor, seq_len: tl.tensor, tile: tl.tensor,
    KV_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """Has a tile's keys and values brought into the second-level cache.

    A hint: the newest token's may be on their way there from the kernel in front.
    """
    LINE: tl.constexpr = 1024 // head_ptr.dtype.element_ty.primitive_bitwidth
    SIDE: tl.constexpr = KV_HEADS * BLOCK_SIZE * SIZE
    position = tile * TILE + tl.arange(0, TILE)
    block_id = tl.load(table_ptr + position // BLOCK_SIZE, mask=position < seq_len, other=0)
    offset = block_id.to(tl.int64) * (2 * SIDE) + position % BLOCK_SIZE * SIZE
    line = tl.arange(0, 4 if SIZE >= 4 * LINE else (2 if SIZE >= 2 * LINE else 1)) * LINE
    for side in tl.static_range(2):
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
            [head_ptr + offset[:, None] + line[None, :] + side * SIDE], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@jit
def load_query(
    pointers: tl.tensor, mask: tl.tensor, query_scale: tl.tensor, FLOAT8: tl.constexpr
) -> Any:
    """The query as it is, twice; for float8 scaled, its even and its odd columns.

    pointers: `[columns, QUERIES]`, for float8 of the even columns alone. Small elements of a scaled
    query vanish in float16 only where they add nothing to a score.
    """
    even = tl.load(pointers, mask=mask, other=0.0)
    odd = even
    if FLOAT8:
        even, odd = even * query_scale, tl.load(pointers + 1, mask=mask, other=0.0) * query_scale
        if pointers.dtype.element_ty != tl.float32:
            even, odd = even.to(tl.float16), odd.to(tl.float16)
    return even, odd


@jit
def load_kv(
    pointers: tl.tensor, mask: tl.tensor, query: tl.tensor, FLOAT8: tl.constexpr,
    COMPILED: tl.constexpr,
) -> Any:  # fmt: skip
    """Keys or values in the query's type: all columns, twice; of float8 the even and the odd."""
    if FLOAT8:
        even, odd = _columns(tl.load(pointers, mask=mask, other=0), COMPILED)
    else:
        even = tl.load(pointers, mask=mask, other=0.0)
        odd = even
    return even.to(query.dtype), odd.to(query.dtype)
