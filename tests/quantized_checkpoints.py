"""Small quantised checkpoints, each beside a plain one that holds what it stands for.

Written from the layouts' descriptions, entry by entry, and knowing nothing of the engine's reader.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

Tensors = dict[str, torch.Tensor]
# A matrix -> what is stored of it by kind, and what that stands for.
Quantize = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output of eight lies at bits 4i


@dataclass(frozen=True)
class QuantizedPair:
    quantized: Path
    plain: Path


def write_pair(
    source: Path,
    target: Path,
    quantize: Quantize,
    config: dict[str, Any],
    *,
    more: Tensors | None = None,
    ignored: tuple[str, ...] = (),
) -> QuantizedPair:
    """`config`: the `quantization_config`. `more`: tensors beside. `ignored`: modules, by the
    ends of their names, that stay plain."""
    quantized, plain = target / "quantized", target / "plain"
    tensors: Tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors |= load_file(path)
    stored: Tensors = dict(more or {})
    meant: Tensors = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if not module.endswith("_proj") or kind != "weight" or module.endswith(ignored or ("?",)):
            stored[name] = meant[name] = tensor
            continue
        parts, meant[name] = quantize(tensor.float())
        stored |= {f"{module}.{kind}": part.contiguous() for kind, part in parts.items()}
    facts = json.loads((source / "config.json").read_text())
    for folder, content, more_facts in (
        (quantized, stored, {"quantization_config": config}),
        (plain, meant, {}),
    ):
        folder.mkdir(parents=True)
        save_file(content, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(facts | more_facts))
        if (source / "generation_config.json").is_file():
            shutil.copy(source / "generation_config.json", folder)
    return QuantizedPair(quantized, plain)


def float8_by_tensor(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().max() / 448
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def float8_by_channel(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def float8_by_block(weight: torch.Tensor, size: int) -> tuple[Tensors, torch.Tensor]:
    rows, columns = (-(-extent // size) for extent in weight.shape)
    scales = torch.empty(rows, columns)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    meant = torch.empty_like(weight)
    for i in range(rows):
        for j in range(columns):
            place = (slice(i * size, i * size + size), slice(j * size, j * size + size))
            scales[i, j] = weight[place].abs().max() / 448
            values[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[place] = values[place].float() * scales[i, j]
    return {"weight": values, "weight_scale_inv": scales}, meant


def with_input_scale(stored: Tensors, scale: float) -> Tensors:
    return stored | {"input_scale": torch.tensor([scale])}


@dataclass(frozen=True)
class Rounded:
    """4-bit codes, zeros and float16 scales of a matrix, and what they mean."""

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor

    @property
    def meant(self) -> torch.Tensor:
        zeros, scales = self.zeros[:, self.groups], self.scales.float()[:, self.groups]
        return (self.codes - zeros) * scales


def rounded(
    weight: torch.Tensor, group_size: int, *, symmetric: bool, groups: torch.Tensor | None = None
) -> Rounded:
    out_size, in_size = weight.shape
    if groups is None:
        groups = torch.arange(in_size) // group_size
    codes = torch.empty(out_size, in_size, dtype=torch.int32)
    num_groups = in_size // group_size
    zeros = torch.full((out_size, num_groups), 8, dtype=torch.int32)
    scales = torch.empty(out_size, num_groups, dtype=torch.float16)
    for group in range(num_groups):
        part = weight[:, groups == group]
        if symmetric:
            scale = part.abs().amax(1) / 7.5
        else:
            scale = (part.amax(1) - part.amin(1)) / 15
            zeros[:, group] = (-part.amin(1) / scale).round().clamp(0, 15).int()
        scales[:, group] = scale.half()
        code = (part / scales[:, group, None].float()).round() + zeros[:, group, None]
        codes[:, groups == group] = code.clamp(0, 15).int()
    return Rounded(codes, zeros, scales, groups)


def awq(weight: torch.Tensor, group_size: int) -> tuple[Tensors, torch.Tensor]:
    matrix = rounded(weight, group_size, symmetric=False)
    stored = {
        "qweight": words_of_columns(matrix.codes.t(), AWQ_ORDER),
        "qzeros": words_of_columns(matrix.zeros.t(), AWQ_ORDER),
        "scales": matrix.scales.t(),
    }
    return stored, matrix.meant


def gptq(
    weight: torch.Tensor,
    group_size: int,
    *,
    symmetric: bool = False,
    zero_offset: int = 1,
    activation_order: bool = False,
    has_groups: bool = True,
) -> tuple[Tensors, torch.Tensor]:
    groups = torch.arange(weight.shape[1]) // group_size
    if activation_order:
        groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(1))]
    matrix = rounded(weight, group_size, symmetric=symmetric, groups=groups)
    stored_zeros = (matrix.zeros.t() - zero_offset) & 15
    order = tuple(range(8))
    stored = {
        "qweight": words_of_columns(matrix.codes, order).t(),
        "qzeros": words_of_columns(stored_zeros, order),
        "scales": matrix.scales.t(),
    }
    return stored | ({"g_idx": groups.int()} if has_groups else {}), matrix.meant


def words_of_columns(codes: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """int32 `[rows, columns / 8]`: column order[i] of eight lies at bits 4i."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for i, column in enumerate(order):
        words |= codes[:, column::8].long() << (4 * i)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
