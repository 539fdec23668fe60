"""Four-bit weights in the layout that kernels read.

1. A matrix has codes 0 to 15, a scale and a zero per group of inputs and output:
   `weight[n, k] = (code[n, k] - zero[g, n]) * scale[g, n]`, g = k // group_size. How AWQ and GPTQ
   store them is the loader's; `pack_codes` is called once, at load.
2. `Int4Weight.codes` is int32 `[N / 16, K / 64, 128]`: a tile of 16 outputs and 64 inputs is 512
   bytes in a row, 16 for each thread of a warp, as tensor cores want their operand: thread
   (g, t) = (lane / 4, lane % 4) has words (output g, inputs 8t..8t+7), (output g + 8, the same),
   (output g, inputs 32 + 8t..), (output g + 8, inputs 32 + 8t..).
3. Inside a word, input i of the eight has bits 4 * (i // 2) + 16 * (i % 2): one mask per pair then
   leaves two codes in the two halves of the word, where a bfloat16 pair will be.

Inputs of an act-order matrix of GPTQ are reordered, so that groups are contiguous; `order` says how
x is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TILE_OUT = 16
TILE_IN = 64


class UnsupportedInt4Error(ValueError):
    """A four-bit matrix whose shape or groups no kernel here can read."""


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A matrix `[N, K]` in four bits.

    codes: see above. scales: `[K / group_size, N]` in the checkpoint's type; zeros: the same shape
    in the type of the activations. order: int64 `[K]`, column i of the packed matrix belongs to
    input order[i]; None: as they come.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group_size: int
    order: torch.Tensor | None

    @property
    def out_size(self) -> int:
        return self.codes.shape[0] * TILE_OUT

    @property
    def in_size(self) -> int:
        return self.codes.shape[1] * TILE_IN


def pack_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    *,
    dtype: torch.dtype,
    order: torch.Tensor | None = None,
) -> Int4Weight:
    """codes: uint8 `[N, K]` of 0 to 15; scales, zeros: `[K / group_size, N]`. N must be a multiple
    of 16, K of 64, group_size 32 or a multiple of 64."""
    out_size, in_size = codes.shape
    group_size = in_size // scales.shape[0]
    if out_size % TILE_OUT or in_size % TILE_IN or in_size != group_size * scales.shape[0]:
        raise UnsupportedInt4Error(f"{out_size} x {in_size} in {scales.shape[0]} groups")
    if group_size != 32 and group_size % TILE_IN:
        raise UnsupportedInt4Error(f"groups of {group_size}")
    # [tile out, half, g, tile in, half, t, i] -> [tile out, tile in, g, t, half in, half out, i]
    tiles = codes.view(out_size // TILE_OUT, 2, 8, in_size // TILE_IN, 2, 4, 8)
    tiles = tiles.permute(0, 3, 2, 5, 4, 1, 6).to(torch.int64)
    shifts = [4 * (i // 2) + 16 * (i % 2) for i in range(8)]
    words = (tiles << torch.tensor(shifts, device=codes.device)).sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return Int4Weight(
        words.reshape(out_size // TILE_OUT, in_size // TILE_IN, 2 * TILE_OUT * TILE_IN // 16),
        scales.contiguous(),
        zeros.to(dtype).contiguous(),
        group_size,
        order,
    )


def unpack_codes(weight: Int4Weight) -> torch.Tensor:
    """The codes again: uint8 `[N, K]`, columns in packed order."""
    tiles_out, tiles_in, _ = weight.codes.shape
    shifts = [4 * (i // 2) + 16 * (i % 2) for i in range(8)]
    device = weight.codes.device
    words = weight.codes.view(tiles_out, tiles_in, 8, 4, 2, 2, 1)
    codes = (words >> torch.tensor(shifts, dtype=torch.int32, device=device)) & 15
    codes = codes.permute(0, 5, 2, 1, 4, 3, 6).to(torch.uint8)
    return codes.reshape(weight.out_size, weight.in_size)


def dequantize(weight: Int4Weight) -> torch.Tensor:
    """The matrix `[N, K]`, columns in packed order, in the type of its zeros. The reference."""
    dtype = torch.promote_types(weight.zeros.dtype, torch.float32)
    groups = unpack_codes(weight).to(dtype).view(weight.out_size, -1, weight.group_size)
    zeros, scales = (
        weight.zeros.to(dtype).t().unsqueeze(2),
        weight.scales.to(dtype).t().unsqueeze(2),
    )
    matrix = (groups - zeros) * scales
    return matrix.view(weight.out_size, weight.in_size).to(weight.zeros.dtype)
