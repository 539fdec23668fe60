"""Weights of 16, 8 and 4 bits as the tensor cores' wide operand, from shared memory. In Gluon.

A block is 16 outputs by 64 inputs (FP8: 128) for each of 8 warps. A thread reads 16 bytes at a time
that are its own part of the operand (`k_width`), so nothing moves between threads.

FP8 and four-bit weights become float16: both fit exactly, and it is the one type that Hopper
converts FP8 to at a useful rate, two values by an instruction. Codes of four bits are put into the
mantissa of 1024 by two instructions for two; that and the zero are subtracted, which is exact, and
the scale is multiplied, which rounds once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from kernels.gluon_api import Blocks, gl, gluon_jit, shared_layout

WARPS = 8
TILE_OUT = 16


@lru_cache(maxsize=4)
def word_layouts(bits: int) -> tuple[Any, Any]:
    """Where a block's words lie in shared memory, and in registers (None: as the operand)."""
    shared = gl.NVMMASharedLayout(0 if bits == 4 else 128, 16 if bits == 16 else 32, 3)
    if bits == 16:
        return shared, None
    if bits == 8:
        registers = [[0, 0, 1], [0, 0, 2], [0, 8, 0], [0, 0, 16]]
        lanes = [[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
        warps, shape = [[1, 0, 0], [2, 0, 0], [4, 0, 0]], [WARPS, TILE_OUT, 32]
    else:
        registers = [[0, 0, 1], [0, 0, 2]]
        lanes = [[0, 0, 4], [0, 0, 8], [0, 0, 16], [0, 0, 32], [0, 0, 64]]
        warps, shape = [[0, 1, 0], [0, 2, 0], [0, 4, 0]], [1, WARPS, 128]
    return shared, gl.DistributedLinearLayout(registers, lanes, warps, [], shape)


def descriptor(weight: torch.Tensor, bits: int, blocks: int, *, paired: bool = False) -> Any:
    """The matrix for the bulk copy engine, block by block: `[blocks of inputs, outputs, inputs of a
    block]`; four bits as they are packed, `[tiles of outputs, blocks of inputs, 128 words]`.

    paired: a tile is 8 outputs of the first half and the same 8 of the second.
    """
    shared, _ = word_layouts(bits)
    if bits == 4:
        shape, strides = list(weight.shape), list(weight.stride())
        return Blocks(weight, shape, strides, [1, blocks * WARPS, 128], shared)
    words = weight if bits == 16 else weight.view(torch.int32)
    out_size, row = words.shape
    block = 64 if bits == 16 else 32
    if paired:
        shape, strides = (
            [row // block, 2, out_size // 2, block],
            [block, out_size // 2 * row, row, 1],
        )
        shared = shared_layout(16 if bits == 16 else 32, 4)
        return Blocks(words, shape, strides, [blocks * WARPS, 2, 8, block], shared)
    shape, strides = [row // block, out_size, block], [block, row, 1]
    return Blocks(words, shape, strides, [blocks * WARPS, TILE_OUT, block], shared)


@gluon_jit
def _widen_fp8(words: gl.tensor) -> Any:
    """Four values from each word."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        .reg .b32 t, u;
        mov.b32 {low, high}, $4;
        cvt.rn.f16x2.e4m3x2 t, low;
        cvt.rn.f16x2.e4m3x2 u, high;
        mov.b32 {$0, $1}, t;
        mov.b32 {$2, $3}, u;
        }""",
        "=h,=h,=h,=h,r", [words], dtype=(gl.float16,) * 4, is_pure=True, pack=1,
    )  # fmt: skip


@gluon_jit
def _widen_codes(words: gl.tensor, zeros: gl.tensor, scales: gl.tensor) -> Any:
    """Eight values from each word; zeros are 1024 more than they are."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 p, q, r, s, zero, scale;
        shr.b32 q, $8, 4;
        shr.b32 r, $8, 8;
        shr.b32 s, $8, 12;
        lop3.b32 p, $8, 0x000F000F, 0x64006400, 0xEA;
        lop3.b32 q, q, 0x000F000F, 0x64006400, 0xEA;
        lop3.b32 r, r, 0x000F000F, 0x64006400, 0xEA;
        lop3.b32 s, s, 0x000F000F, 0x64006400, 0xEA;
        mov.b32 zero, {$9, $9};
        mov.b32 scale, {$10, $10};
        sub.rn.f16x2 p, p, zero;
        sub.rn.f16x2 q, q, zero;
        sub.rn.f16x2 r, r, zero;
        sub.rn.f16x2 s, s, zero;
        mul.rn.f16x2 p, p, scale;
        mul.rn.f16x2 q, q, scale;
        mul.rn.f16x2 r, r, scale;
        mul.rn.f16x2 s, s, scale;
        mov.b32 {$0, $1}, p;
        mov.b32 {$2, $3}, q;
        mov.b32 {$4, $5}, r;
        mov.b32 {$6, $7}, s;
        }""",
        "=h,=h,=h,=h,=h,=h,=h,=h,r,h,h", [words, zeros, scales], dtype=(gl.float16,) * 8,
        is_pure=True, pack=1,
    )  # fmt: skip


@gluon_jit
def _of_group(
    table_ptr: gl.tensor, first_output: gl.tensor, first_block: gl.tensor, OUTPUTS: gl.constexpr,
    IN: gl.constexpr, GROUP: gl.constexpr, WORDS: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Zeros or scales for each word of a block: `[1, warps, 128]`. Where a word is: see
    `int4_packing`."""
    warp = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))[None, :, None]
    word = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))[None, None, :]
    first_input = (first_block + warp) * 64
    if GROUP == 32:
        first_input += word // 2 % 2 * 32
    group = gl.minimum(first_input // GROUP, IN // GROUP - 1)
    output = first_output + word // 16 + word % 2 * 8
    return gl.load(table_ptr + group * OUTPUTS + output)


@gluon_jit
def operand(
    block: gl.shared_memory_descriptor, zeros_ptr: gl.tensor, scales_ptr: gl.tensor,
    first_output: gl.tensor, first_block: gl.tensor, OUTPUTS: gl.constexpr, IN: gl.constexpr,
    BITS: gl.constexpr, GROUP: gl.constexpr, WORDS: gl.constexpr, LAYOUT: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """`[warps, 16, inputs of a block]` in the operand's LAYOUT."""
    if BITS == 16:
        wide = block.load(LAYOUT)
    elif BITS == 8:
        words = block.load(WORDS)
        a, b, c, d = _widen_fp8(words)
        values = gl.join(gl.join(a, c), gl.join(b, d))
        values = gl.reshape(values, [words.shape[0], words.shape[1], 4 * words.shape[2]])
        wide = gl.convert_layout(values, LAYOUT, assert_trivial=True)
    else:
        zeros = _of_group(zeros_ptr, first_output, first_block, OUTPUTS, IN, GROUP, WORDS)
        zeros = (zeros.to(gl.float32) + 1024.0).to(gl.float16)
        scales = _of_group(scales_ptr, first_output, first_block, OUTPUTS, IN, GROUP, WORDS)
        a, b, c, d, e, f, g, h = _widen_codes(block.load(WORDS), zeros, scales.to(gl.float16))
        even = gl.join(gl.join(a, e), gl.join(c, g))
        odd = gl.join(gl.join(b, f), gl.join(d, h))
        # [warp, output of 8, input of 32 / 8, half of inputs, half of outputs, input of 8]
        values = gl.reshape(gl.join(even, odd), [8, 8, 4, 2, 2, 8])
        values = gl.reshape(gl.permute(values, (0, 4, 1, 3, 2, 5)), [8, 16, 64])
        wide = gl.convert_layout(values, LAYOUT, assert_trivial=True)
    return wide
