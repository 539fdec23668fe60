"""How a model's matrices are quantised, from `quantization_config` of its `config.json`.

1. `Quantization.from_facts` reads the layout of a checkpoint that was quantised before. What it
   names but this engine does not compute is a `ConfigError` in one line.
2. `resolve_quantization` weighs it against `--quantization`: a method that the checkpoint does
   not have is refused; "fp8" on a checkpoint of plain floats quantises it while it is loaded.

Layouts: compressed-tensors ("float-quantized") and "fp8" hold float8_e4m3fn with scales; "awq"
(AutoAWQ, "gemm") and "gptq" (AutoGPTQ and GPTQModel) hold 4-bit integers with scales and zeros.
Which matrices of a model are quantised is not read here but from the tensors that are there.

Knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from engine.models.json_facts import JsonFacts

QuantizationMethod = Literal["fp8", "compressed-tensors", "awq", "gptq"]
METHODS: tuple[QuantizationMethod, ...] = ("awq", "compressed-tensors", "fp8", "gptq")

_SOURCE = "config.json: quantization_config"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How matrices are stored.

    `method`: the layout's name. `on_load`: the files hold plain floats. `static_activations`:
    the checkpoint brings the scale of each matrix's inputs. `block`: (rows, columns) that share
    a scale, None for rows or whole matrices. `group_size`: inputs that share a scale and a zero
    in 4-bit layouts, 0 for all. `zero_offset`: what is added to a stored zero to get the real
    one (GPTQ's first format stores them one too low).
    """

    method: QuantizationMethod
    on_load: bool = False
    static_activations: bool = False
    block: tuple[int, int] | None = None
    group_size: int = 0
    zero_offset: int = 0

    @property
    def is_float8(self) -> bool:
        return self.method in ("fp8", "compressed-tensors")

    @property
    def stores_float8(self) -> bool:
        return self.is_float8 and not self.on_load

    @property
    def stores_int4(self) -> bool:
        return not self.is_float8

    @classmethod
    def from_facts(cls, facts: JsonFacts) -> Quantization | None:
        """`facts`: all of `config.json`. None when the checkpoint is not quantised."""
        quantization = facts.child("quantization_config") or facts.child("compression_config")
        if quantization is None:
            return None
        method = quantization.string("quant_method", "")
        if method == "fp8":
            return _fp8(quantization)
        if method == "compressed-tensors":
            return _compressed_tensors(quantization)
        if method == "awq":
            return _awq(quantization)
        if method == "gptq":
            return _gptq(quantization)
        raise _unsupported(f"quant_method {method!r}", ", ".join(METHODS))


ON_LOAD = Quantization(method="fp8", on_load=True)


def resolve_quantization(
    asked: QuantizationMethod | None, stored: Quantization | None
) -> Quantization | None:
    """What the engine computes with; raises `ConfigError` when the two do not fit.

    "fp8" fits every checkpoint of 8-bit floats, whichever layout they are in.
    """
    if asked is None or (stored is not None and asked == stored.method):
        return stored
    if asked == "fp8" and stored is None:
        return ON_LOAD
    if asked == "fp8" and stored is not None and stored.is_float8:
        return stored
    found = "not quantized" if stored is None else f"in {stored.method} layout"
    raise ConfigError(f"--quantization {asked}: the checkpoint is {found}.", param="quantization")


def _fp8(facts: JsonFacts) -> Quantization:
    scheme = facts.string("activation_scheme", "dynamic")
    if scheme not in ("static", "dynamic"):
        raise _unsupported(f"activation_scheme {scheme!r}", "static, dynamic")
    number_format = facts.string("fmt", "e4m3")
    if number_format not in ("e4m3", "float8_e4m3fn"):
        raise _unsupported(f"fmt {number_format!r}", "e4m3")
    block = _block(facts, "weight_block_size")
    return _float8("fp8", is_static=scheme == "static", block=block)


def _float8(
    method: QuantizationMethod, *, is_static: bool, block: tuple[int, int] | None
) -> Quantization:
    if is_static and block is not None:
        raise _unsupported("static activations beside scales of blocks", "dynamic ones")
    return Quantization(method=method, static_activations=is_static, block=block)


def _compressed_tensors(facts: JsonFacts) -> Quantization:
    stored_as = facts.string("format", "float-quantized")
    if stored_as not in ("float-quantized", "naive-quantized"):
        raise _unsupported(f"format {stored_as!r}", "float-quantized")
    groups = facts.child("config_groups")
    schemes = {_scheme(group) for group in groups.children()} if groups is not None else set()
    if len(schemes) != 1:
        raise _unsupported(f"{len(schemes)} different config_groups", "one")
    (scheme,) = schemes
    return scheme


def _scheme(group: JsonFacts) -> Quantization:
    """One of the config groups: float8 weights, float8 inputs."""
    weights, inputs = group.child("weights"), group.child("input_activations")
    if weights is None or inputs is None:
        raise _unsupported("a config group without weights or input_activations", "both")
    for side, name in ((weights, "weights"), (inputs, "input_activations")):
        kind = f"{side.integer('num_bits', 8)}-bit {side.string('type', 'int')}"
        if kind != "8-bit float":
            raise _unsupported(f"{kind} {name}", "8-bit float")
    strategy = weights.string("strategy", "tensor")
    if strategy not in ("tensor", "channel", "block"):
        raise _unsupported(f"strategy {strategy!r} of weights", "tensor, channel, block")
    block = _block(weights, "block_structure") if strategy == "block" else None
    is_static = not inputs.boolean("dynamic", False)
    return _float8("compressed-tensors", is_static=is_static, block=block)


def _awq(facts: JsonFacts) -> Quantization:
    version = facts.string("version", "gemm").lower()
    if version != "gemm":
        raise _unsupported(f"version {version!r} of awq", "gemm")
    _check_bits(facts.integer("bits", facts.integer("w_bit", 4)))
    if not facts.boolean("zero_point", True):
        raise _unsupported("awq without zero_point", "zero_point")
    return Quantization(method="awq", group_size=_group_size(facts))


def _gptq(facts: JsonFacts) -> Quantization:
    _check_bits(facts.integer("bits", 4))
    stored_as = facts.string("checkpoint_format", "gptq")
    if stored_as not in ("gptq", "gptq_v2"):
        raise _unsupported(f"checkpoint_format {stored_as!r}", "gptq, gptq_v2")
    offset = 1 if stored_as == "gptq" else 0
    return Quantization(method="gptq", group_size=_group_size(facts), zero_offset=offset)


def _check_bits(bits: int) -> None:
    if bits != 4:
        raise _unsupported(f"{bits}-bit weights", "4-bit")


def _group_size(facts: JsonFacts) -> int:
    size = facts.integer("group_size", 128)
    if size == -1:
        return 0
    if size < 8 or size % 8:
        raise _unsupported(f"group_size {size}", "-1 or a multiple of 8")
    return size


def _block(facts: JsonFacts, name: str) -> tuple[int, int] | None:
    if not facts.has(name):
        return None
    sizes = facts.integers(name)
    if len(sizes) != 2 or min(sizes) < 1:
        raise _unsupported(f"{name} {sizes}", "two positive numbers")
    return sizes[0], sizes[1]


def _unsupported(what: str, supported: str) -> ConfigError:
    return ConfigError(
        f"{_SOURCE} has {what}, which is not supported; supported: {supported}.", param="model"
    )
