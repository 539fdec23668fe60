"""How the matrices of a checkpoint are stored, and how they are read, one at a time.

A module of a checkpoint (`model.layers.0.mlp.down_proj`) is one tensor of plain floats, or several
that make up a quantised matrix. `stored_matrix` tells by the tensors that are there which it is;
what must be there beside them and in which shape is checked before any byte is read.

    plain   weight [out, in]
    float8  weight [out, in] F8_E4M3; weight_scale [], [1], [out] or [out, 1]; input_scale [] or [1]
            with static activations. Scaled by blocks: weight_scale_inv (or weight_scale)
            [out / rows, in / columns].
    awq     qweight [in, out / 8] I32, eight outputs a word in the order 0 2 4 6 1 3 5 7 from the
            lowest bits on; qzeros [groups, out / 8] likewise; scales [groups, out]
    gptq    qweight [in / 8, out] I32, eight inputs a word; qzeros [groups, out / 8] eight outputs
            a word; scales [groups, out]; g_idx [in], the group of each input, perhaps missing

Whatever does not fit is a `ConfigError` that names the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from cluster.errors import ConfigError
from engine.models.quantization import ON_LOAD
from engine.quantized_tensors import Float8Weights, Int4Weights, block_dequantized, to_float8

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from engine.models.quantization import Quantization
    from engine.quantized_tensors import Weights

    # The whole tensor of a name, on the device where it is needed.
    Read = Callable[[str], torch.Tensor]

FLOATS = ("BF16", "F16", "F32")
_FLOAT8 = "F8_E4M3"
_PER_WORD = 8  # 4-bit integers in 32 bits
# Output j of a word of AWQ lies at bits 4 * _AWQ_PLACES[j].
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
_PLACES = tuple(range(_PER_WORD))
# What is quantised on load; embeddings and the output matrix stay as they are.
_LAYER_MATRIX = "_proj"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as its file describes it."""

    name: str
    path: Path
    dtype: str
    shape: Shape


class StoredMatrix(Protocol):
    """`shape`: (out_size, in_size) of the whole matrix. `names`: its tensors, in no order."""

    @property
    def shape(self) -> Shape: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    def read(self, read: Read) -> Weights: ...


def stored_matrix(
    module: str, headers: Mapping[str, TensorHeader], quantization: Quantization | None
) -> StoredMatrix | None:
    """None when the checkpoint has no matrix of this name."""
    parts = _Parts(module, headers)
    if parts.has("qweight"):
        if quantization is None or not quantization.stores_int4:
            raise bad(f"{module}.qweight is quantized in a way that config.json does not tell")
        return _int4(parts, quantization)
    if not parts.has("weight"):
        return None
    weight = parts["weight"]
    if weight.dtype == _FLOAT8 and quantization is not None and quantization.stores_float8:
        return _Float8Matrix.checked(parts, quantization)
    parts.check("weight", FLOATS)
    plain = PlainMatrix(weight.name, weight.shape)
    is_layers = module.endswith(_LAYER_MATRIX)
    return _QuantizedOnLoad(plain) if quantization == ON_LOAD and is_layers else plain


@dataclass(frozen=True, slots=True)
class _Parts:
    """The tensors of one module by the last part of their names."""

    module: str
    headers: Mapping[str, TensorHeader]

    def has(self, kind: str) -> bool:
        return f"{self.module}.{kind}" in self.headers

    def __getitem__(self, kind: str) -> TensorHeader:
        name = f"{self.module}.{kind}"
        if name not in self.headers:
            raise bad(f"the checkpoint lacks {name}")
        return self.headers[name]

    def check(self, kind: str, dtypes: tuple[str, ...], *shapes: Shape) -> None:
        """Its type is one of `dtypes`; its shape, when any are named, one of `shapes`."""
        header = self[kind]
        if header.dtype not in dtypes:
            raise bad(f"{header.name} is stored as {header.dtype}; supported are {_or(dtypes)}")
        if shapes and header.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise bad(f"{header.name} has shape {list(header.shape)}, not {wanted}")


@dataclass(frozen=True, slots=True)
class PlainMatrix:
    """Any tensor of plain floats."""

    name: str
    shape: Shape

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, read: Read) -> Weights:
        return read(self.name)


@dataclass(frozen=True, slots=True)
class _QuantizedOnLoad:
    """Plain floats in the files, float8 from there on."""

    plain: PlainMatrix

    @property
    def shape(self) -> Shape:
        return self.plain.shape

    @property
    def names(self) -> tuple[str, ...]:
        return self.plain.names

    def read(self, read: Read) -> Weights:
        return to_float8(self.plain.read(read))


@dataclass(frozen=True, slots=True)
class _Float8Matrix:
    weight: str
    scale: str
    input_scale: str | None
    shape: Shape
    block: tuple[int, int] | None

    @classmethod
    def checked(cls, parts: _Parts, quantization: Quantization) -> _Float8Matrix:
        shape = parts["weight"].shape
        if len(shape) != 2:
            raise bad(f"{parts.module}.weight has shape {list(shape)}, which is no matrix")
        block = quantization.block
        scale = "weight_scale_inv" if parts.has("weight_scale_inv") else "weight_scale"
        if block is None:
            parts.check(scale, FLOATS, (), (1,), (1, 1), (shape[0],), (shape[0], 1))
        else:
            num_blocks = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
            parts.check(scale, FLOATS, num_blocks)
        input_scale = None
        if quantization.static_activations:
            parts.check("input_scale", FLOATS, (), (1,))
            input_scale = parts["input_scale"].name
        return cls(parts["weight"].name, parts[scale].name, input_scale, shape, block)

    @property
    def names(self) -> tuple[str, ...]:
        names = (self.weight, self.scale)
        return names if self.input_scale is None else (*names, self.input_scale)

    def read(self, read: Read) -> Weights:
        values, scales = read(self.weight), read(self.scale)
        if self.block is not None:
            return block_dequantized(values, scales, self.block)
        scales = scales.float().flatten().expand(self.shape[0]).contiguous()
        input_scale = None if self.input_scale is None else read(self.input_scale).float().view(1)
        return Float8Weights(values, scales, input_scale)


def _int4(parts: _Parts, quantization: Quantization) -> StoredMatrix:
    words = parts["qweight"].shape
    if len(words) != 2:
        raise bad(f"{parts.module}.qweight has shape {list(words)}, which is no matrix")
    is_awq = quantization.method == "awq"
    in_size, out_size = (
        (words[0], words[1] * _PER_WORD) if is_awq else (words[0] * _PER_WORD, words[1])
    )
    group_size = quantization.group_size or in_size
    if in_size % group_size or in_size % 2 or out_size % _PER_WORD:
        raise bad(f"{parts.module} [{out_size}, {in_size}] is no multiple of groups and words")
    num_groups = in_size // group_size
    parts.check("qweight", ("I32",))
    parts.check("qzeros", ("I32",), (num_groups, out_size // _PER_WORD))
    parts.check("scales", FLOATS, (num_groups, out_size))
    if is_awq:
        return _AwqMatrix(parts.module, (out_size, in_size))
    has_groups = parts.has("g_idx")
    if has_groups:
        parts.check("g_idx", ("I32", "I64"), (in_size,))
    return _GptqMatrix(
        parts.module, (out_size, in_size), group_size, quantization.zero_offset, has_groups
    )


@dataclass(frozen=True, slots=True)
class _AwqMatrix:
    module: str
    shape: Shape

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{self.module}.{kind}" for kind in ("qweight", "qzeros", "scales"))

    def read(self, read: Read) -> Weights:
        words, zero_words, scales = map(read, self.names)
        codes = _unpacked(words, 1, _AWQ_PLACES).t().contiguous()
        zeros = _unpacked(zero_words, 1, _AWQ_PLACES).t().contiguous()
        return Int4Weights(codes, scales.float().t().contiguous(), zeros)


@dataclass(frozen=True, slots=True)
class _GptqMatrix:
    module: str
    shape: Shape
    group_size: int
    zero_offset: int
    has_groups: bool

    @property
    def names(self) -> tuple[str, ...]:
        kinds = ("qweight", "qzeros", "scales", *(("g_idx",) if self.has_groups else ()))
        return tuple(f"{self.module}.{kind}" for kind in kinds)

    def read(self, read: Read) -> Weights:
        words, zero_words, scales, *groups = map(read, self.names)
        codes = _unpacked(words, 0, _PLACES).t().contiguous()
        zeros = _unpacked(zero_words, 1, _PLACES).t().contiguous()
        # The first format keeps a zero of 0 as -1, which in four bits is 15.
        zeros = (zeros + self.zero_offset) & 15 if self.zero_offset else zeros
        weights = Int4Weights(codes, scales.float().t().contiguous(), zeros)
        return self._grouped(weights, groups[0].long()) if groups else weights

    def _grouped(self, weights: Int4Weights, groups: torch.Tensor) -> Weights:
        """With the groups of `desc_act`, unless they are runs of equal length after all."""
        in_order = torch.arange(len(groups), device=groups.device) // self.group_size
        if torch.equal(groups, in_order):
            return weights
        sizes = torch.bincount(groups.clamp(min=0), minlength=weights.scales.shape[1])
        if (groups < 0).any() or not (sizes == self.group_size).all():
            raise bad(f"{self.module}.g_idx names groups that are not all of one size")
        return Int4Weights(weights.codes, weights.scales, weights.zeros, groups)


def _unpacked(words: torch.Tensor, dim: int, places: tuple[int, ...]) -> torch.Tensor:
    """uint8 of eight times as many entries along `dim`; entry j of a word is at bits
    4 * places[j]."""
    parts = [((words >> (4 * place)) & 15).to(torch.uint8) for place in places]
    stacked = torch.stack(parts, dim=dim + 1)
    shape = list(words.shape)
    shape[dim] *= _PER_WORD
    return stacked.view(shape)


def bad(problem: str) -> ConfigError:
    return ConfigError(f"Cannot load the model: {problem}.", param="model")


def _or(names: tuple[str, ...]) -> str:
    return ", ".join(names)
