"""Weights in 8-bit floats and 4-bit integers, and the arithmetic between them and plain floats.

All of it in the orientation that the engine computes with: `[out_size, in_size]`, a row for each
output. What a scale or zero is for, it multiplies or is subtracted from first:
`float8 * scale` and `(code - zero) * scale`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.fp8_linear import quantize_weight

INT4_MAX = 15


@dataclass(frozen=True, slots=True)
class Float8Weights:
    """`values` float8_e4m3fn `[out_size, in_size]`, `scales` float32 `[out_size]`.

    `input_scale`: float32 `[1]`, what inputs are divided by before they become float8; None where
    that is found out from the inputs.
    """

    values: torch.Tensor
    scales: torch.Tensor
    input_scale: torch.Tensor | None = None

    def dequantized(self) -> torch.Tensor:
        """float32 `[out_size, in_size]`."""
        return self.values.float() * self.scales[:, None]


@dataclass(frozen=True, slots=True)
class Int4Weights:
    """`codes` uint8 `[out_size, in_size]` of 0 to 15; `scales` float32 and `zeros` uint8
    `[out_size, num_groups]`.

    `groups`: int64 `[in_size]`, the group of each input; None when groups are runs of equal
    length, one after the other.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    groups: torch.Tensor | None = None

    def dequantized(self) -> torch.Tensor:
        """float32 `[out_size, in_size]`."""
        out_size, in_size = self.codes.shape
        if self.groups is None:
            by_group = self.codes.view(out_size, self.scales.shape[1], -1).float()
            by_group = (by_group - self.zeros[..., None].float()) * self.scales[..., None]
            return by_group.view(out_size, in_size)
        zeros = self.zeros.float().index_select(1, self.groups)
        return (self.codes.float() - zeros) * self.scales.index_select(1, self.groups)

    def packed(self) -> torch.Tensor:
        """uint8 `[out_size, in_size / 2]`: input 2i in the low half of byte i, 2i + 1 in the
        high one."""
        return self.codes[:, 0::2] | (self.codes[:, 1::2] << 4)


Weights = torch.Tensor | Float8Weights | Int4Weights


def dequantized(weights: Weights) -> torch.Tensor:
    """Floats `[out_size, in_size]`; plain ones as they are."""
    return weights if isinstance(weights, torch.Tensor) else weights.dequantized()


def to_float8(weights: Weights) -> Float8Weights:
    """The same in 8-bit floats: rows are scaled so that the largest value is the largest that
    the type has."""
    if isinstance(weights, Float8Weights):
        return weights
    return Float8Weights(*quantize_weight(dequantized(weights)))


def to_int4(weights: Weights, group_size: int) -> Int4Weights:
    """The same in 4-bit integers, rounded to the nearest of 16 steps from the least to the
    greatest value of a group (zero always included). `group_size` 0: one group."""
    if isinstance(weights, Int4Weights):
        return weights
    weight = dequantized(weights).float()
    out_size, in_size = weight.shape
    by_group = weight.view(out_size, -1, group_size or in_size)
    least = by_group.amin(dim=2).clamp_max(0.0)
    greatest = by_group.amax(dim=2).clamp_min(0.0)
    scales = ((greatest - least) / INT4_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    zeros = (-least / scales).round().clamp(0, INT4_MAX)
    codes = ((by_group / scales[..., None]).round() + zeros[..., None]).clamp(0, INT4_MAX)
    return Int4Weights(codes.to(torch.uint8).view(out_size, in_size), scales, zeros.to(torch.uint8))


def block_dequantized(
    values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """float32 of float8 `[out_size, in_size]` whose `scales` are `[row blocks, column blocks]` of
    `block` (rows, columns), the last ones perhaps cut off."""
    expanded = scales.float()
    for dim, (size, length) in enumerate(zip(values.shape, block, strict=True)):
        expanded = expanded.repeat_interleave(length, dim=dim).narrow(dim, 0, size)
    return values.float() * expanded
