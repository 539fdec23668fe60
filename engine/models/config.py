"""The facts of a model, read from the checkpoint folder once.

1. `ModelConfig.from_folder` reads `config.json` and `generation_config.json`.
2. Whatever makes a family different becomes a fact (biases, qk-norm, windows, rope scaling), so
   one decoder serves all; no code below asks for the architecture's name.
3. What this decoder cannot compute exactly is refused here, by `ConfigError`, in one line.

Knows no torch: gateways and tools may read these facts too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from cluster.errors import ConfigError
from cluster.model_folder import check_model_folder
from engine.models.json_facts import JsonFacts, read_json_object
from engine.models.quantization import Quantization

if TYPE_CHECKING:
    from pathlib import Path

RopeKind = Literal["linear", "llama3", "yarn"]
CheckpointDType = Literal["bfloat16", "float16", "float32"]

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
_LLAMA = "LlamaForCausalLM"
_MISTRAL = "MistralForCausalLM"
_QWEN2 = "Qwen2ForCausalLM"
_QWEN3 = "Qwen3ForCausalLM"
ARCHITECTURES = (_LLAMA, _MISTRAL, _QWEN2, _QWEN3)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    Fields that a kind does not use keep their defaults. `attention_factor` multiplies cos and
    sin (yarn); None means it follows from `factor`.
    """

    kind: RopeKind
    factor: float
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of one decoder-only model.

    `layer_windows[i]` is how many latest tokens layer i attends to, itself included; None
    means all. `attention_bias` is of q, k and v, `output_bias` of the attention's output.
    `quantization` is how the checkpoint stores its matrices, None for plain floats.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    layer_windows: tuple[int | None, ...]
    eos_token_ids: tuple[int, ...]
    torch_dtype: CheckpointDType
    quantization: Quantization | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Raises `ConfigError` when the folder holds no model that this engine can run."""
        check_model_folder(folder)
        facts = JsonFacts(read_json_object(folder / CONFIG_FILE), CONFIG_FILE)
        architecture = _architecture(facts)
        _refuse_what_is_not_computed(facts)
        heads = facts.positive_int("num_attention_heads")
        hidden_size = facts.positive_int("hidden_size")
        num_layers = facts.positive_int("num_hidden_layers")
        vocab_size = facts.positive_int("vocab_size")
        qkv_bias, output_bias = _biases(architecture, facts)
        return cls(
            architecture=architecture,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=_num_kv_heads(facts, heads),
            head_size=_head_size(architecture, facts, hidden_size, heads),
            intermediate_size=facts.positive_int("intermediate_size"),
            vocab_size=vocab_size,
            max_position_embeddings=facts.positive_int("max_position_embeddings"),
            rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(facts),
            rope_scaling=_rope_scaling(facts),
            tie_word_embeddings=facts.boolean("tie_word_embeddings", False),
            attention_bias=qkv_bias,
            output_bias=output_bias,
            mlp_bias=architecture == _LLAMA and facts.boolean("mlp_bias", False),
            qk_norm=architecture == _QWEN3,
            layer_windows=_layer_windows(architecture, facts, num_layers),
            eos_token_ids=_eos_token_ids(folder, facts, vocab_size),
            torch_dtype=_torch_dtype(facts),
            quantization=Quantization.from_facts(facts),
        )

    @property
    def longest_context(self) -> int:
        """Tokens the model was built for, rope scaling included."""
        scaling = self.rope_scaling
        if scaling is None or scaling.kind == "llama3":
            return self.max_position_embeddings
        trained = scaling.original_max_position_embeddings or self.max_position_embeddings
        return int(trained * scaling.factor)

    @property
    def num_parameters(self) -> int:
        """Elements of all weights; norms and biases included, tied embeddings once."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        attention = self.hidden_size * (qkv + self.num_heads * self.head_size)
        attention += qkv * self.attention_bias + self.hidden_size * self.output_bias
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlp += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        norms = 2 * self.hidden_size + 2 * self.head_size * self.qk_norm
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp + norms) + embeddings + self.hidden_size


def _architecture(facts: JsonFacts) -> str:
    named = facts.strings("architectures")
    for name in named:
        if name in ARCHITECTURES:
            return name
    families = ", ".join(name.removesuffix("ForCausalLM") for name in ARCHITECTURES)
    given = ", ".join(named) or "no architecture"
    raise ConfigError(f"{CONFIG_FILE} names {given}; supported are {families}.", param="model")


def _refuse_what_is_not_computed(facts: JsonFacts) -> None:
    activation = facts.string("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"{CONFIG_FILE}: hidden_act {activation!r} is not supported.")
    for holder in (facts, *_rope_children(facts)):
        if holder.number("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(f"{CONFIG_FILE}: partial_rotary_factor is not supported.")


def _num_kv_heads(facts: JsonFacts, num_heads: int) -> int:
    num_kv_heads = facts.positive_int("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"{CONFIG_FILE}: {num_heads} attention heads do not divide into "
            f"{num_kv_heads} key/value heads."
        )
    return num_kv_heads


def _head_size(architecture: str, facts: JsonFacts, hidden_size: int, num_heads: int) -> int:
    if facts.has("head_dim"):
        head_size = facts.positive_int("head_dim")
    elif architecture == _QWEN3:
        head_size = 128  # what the family means by leaving it out
    elif hidden_size % num_heads:
        raise ConfigError(
            f"{CONFIG_FILE}: hidden_size {hidden_size} does not divide into {num_heads} heads."
        )
    else:
        head_size = hidden_size // num_heads
    if head_size % 2:
        raise ConfigError(f"{CONFIG_FILE}: an odd head size ({head_size}) cannot be rotated.")
    return head_size


def _biases(architecture: str, facts: JsonFacts) -> tuple[bool, bool]:
    """Whether q, k, v have biases, and whether the attention's output has one."""
    if architecture == _QWEN2:
        return True, False
    if architecture == _MISTRAL:
        return False, False
    bias = facts.boolean("attention_bias", False)
    return bias, bias


def _layer_windows(architecture: str, facts: JsonFacts, num_layers: int) -> tuple[int | None, ...]:
    if architecture == _LLAMA:
        return (None,) * num_layers
    window = (
        facts.positive_int("sliding_window", 4096) if not facts.is_null("sliding_window") else None
    )
    if architecture == _MISTRAL:
        return (window,) * num_layers
    if not facts.boolean("use_sliding_window", False):
        return (None,) * num_layers
    kinds = facts.strings("layer_types")
    if not kinds:
        first = facts.integer("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if len(kinds) != num_layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"{CONFIG_FILE}: layer_types does not describe {num_layers} layers.")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope_children(facts: JsonFacts) -> list[JsonFacts]:
    """`rope_parameters` of newer checkpoints, `rope_scaling` of older ones; both where somebody has
    stretched a newer one as it was done to older ones."""
    children = (facts.child(name) for name in ("rope_parameters", "rope_scaling"))
    return [child for child in children if child is not None]


def _rope_theta(facts: JsonFacts) -> float:
    """Newer checkpoints nest it, but not all that name a scaling do."""
    holders = (*_rope_children(facts), facts)
    bases = (each.number("rope_theta") for each in holders if each.has("rope_theta"))
    return next(bases, 10_000.0)


def _rope_scaling(facts: JsonFacts) -> RopeScaling | None:
    scalings = {_scaling(child, facts) for child in _rope_children(facts)}
    if len(scalings) > 1:
        raise ConfigError(
            f"{CONFIG_FILE}: rope_parameters and rope_scaling differ; keep the one that is meant.",
            param="model",
        )
    return next(iter(scalings), None)


def _scaling(scaling: JsonFacts, facts: JsonFacts) -> RopeScaling | None:
    kind = scaling.string("rope_type", "") or scaling.string("type", "default")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise ConfigError(
            f"{CONFIG_FILE}: rope scaling {kind!r} is not supported; "
            "supported are linear, llama3 and yarn.",
            param="model",
        )
    factor = scaling.number("factor")
    if factor <= 0:
        raise ConfigError(f"{CONFIG_FILE}: the rope scaling factor must be positive.")
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    original = scaling.positive_int(
        "original_max_position_embeddings", facts.positive_int("max_position_embeddings")
    )
    if kind == "llama3":
        return _llama3_scaling(scaling, factor, original)
    return _yarn_scaling(scaling, factor, original)


def _llama3_scaling(scaling: JsonFacts, factor: float, original: int) -> RopeScaling:
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if not 0 < low < high:
        raise ConfigError(f"{CONFIG_FILE}: low_freq_factor must be below high_freq_factor.")
    return RopeScaling(
        kind="llama3",
        factor=factor,
        original_max_position_embeddings=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn_scaling(scaling: JsonFacts, factor: float, original: int) -> RopeScaling:
    for name in ("mscale", "mscale_all_dim"):
        if scaling.has(name):
            raise ConfigError(f"{CONFIG_FILE}: {name} of yarn is not supported.", param="model")
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        attention_factor=(
            scaling.number("attention_factor") if scaling.has("attention_factor") else None
        ),
        truncate=scaling.boolean("truncate", True),
    )


def _eos_token_ids(folder: Path, facts: JsonFacts, vocab_size: int) -> tuple[int, ...]:
    """End tokens of `generation_config.json`, then of `config.json`, each once.

    Ids the model has no logit for can never be drawn and are left out.
    """
    sources = [facts]
    path = folder / GENERATION_CONFIG_FILE
    if path.is_file():
        sources.insert(0, JsonFacts(read_json_object(path), GENERATION_CONFIG_FILE))
    found = dict.fromkeys(
        token_id for source in sources for token_id in source.integers("eos_token_id")
    )
    return tuple(token_id for token_id in found if 0 <= token_id < vocab_size)


def _torch_dtype(facts: JsonFacts) -> CheckpointDType:
    """The type the checkpoint was saved in: `dtype` in newer files, `torch_dtype` in older."""
    name = facts.string("dtype", "") or facts.string("torch_dtype", "float32")
    if name not in ("bfloat16", "float16", "float32"):
        raise ConfigError(f"{CONFIG_FILE}: dtype {name!r} is not supported.", param="model")
    return cast("CheckpointDType", name)
