"""What "auto" and None mean for one model on one machine.

Pure: the facts of the machine are arguments, so each choice can be tested without it. The same
configuration on two like machines gives the same limits, which nodes that exchange KV rely on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cluster.errors import ConfigError
from engine.models.linear import can_pack
from kernels.attention_backend import Facts, fastest, obstacles

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.models.config import ModelConfig
    from kernels.attention_backend import AttentionBackend

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
# Ada and Hopper; earlier GPUs cannot multiply 8-bit floats.
_FLOAT8_CAPABILITY = (8, 9)
_GPU_BATCHED_TOKENS = 8192
# Programs of a launch beside the first dimension of its grid.
_MOST_GPU_TOKENS = 65535
# A chunk of a small model takes about as long as a person notices; larger ones gain nothing.
_CPU_BATCHED_TOKENS = 512
# Below this size a step is so short that waking other threads costs more than they save.
_SINGLE_THREAD_WEIGHT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Machine:
    """What this process can compute on."""

    num_gpus: int
    cpu_is_fast_at_bfloat16: bool
    gpus_have_float8: bool = True
    # The lowest compute capability of its GPUs.
    capability: tuple[int, int] = (8, 0)

    @classmethod
    def here(cls) -> Machine:
        # Instructions, not a timing: two nodes on like machines must choose alike.
        fast = can_pack(torch.bfloat16, torch.device("cpu")) and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        lowest = min(map(torch.cuda.get_device_capability, range(num_gpus)), default=(0, 0))
        return cls(num_gpus, fast, lowest >= _FLOAT8_CAPABILITY, lowest)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Everything the configuration left open, decided. `num_threads` None: torch's choice.

    `attention_backend`: the kernel of attention to prompts; None on a CPU. `max_graph_rows`: most
    sequences of a decode step that a CUDA graph is captured for.
    """

    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    max_model_len: int
    max_num_seqs: int
    max_graph_rows: int
    max_num_batched_tokens: int
    num_threads: int | None
    attention_backend: AttentionBackend | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def resolve(
    config: EngineConfig, model: ModelConfig, machine: Machine, *, rank: int = 0
) -> EngineLimits:
    """Raises `ConfigError` when the machine or the model cannot do what is asked.

    `rank`: of several that share the model, each on a GPU of its own, one beside the other.
    """
    first = _device(config.device, machine, config.tensor_parallel_size)
    device = torch.device("cuda", first.index + rank) if first.type == "cuda" else first
    on_gpu = device.type == "cuda"
    dtype = _dtype(config.dtype, model, machine, on_gpu=on_gpu)
    if on_gpu and not machine.gpus_have_float8:
        _check_no_float8(config, model)
    if config.cpu_offload_gb and not on_gpu:
        # Refused, not ignored: whoever asks for it counts on memory that would not be there.
        raise ConfigError(
            "--cpu-offload-gb needs a GPU: on a CPU the weights are in main memory already.",
            param="cpu_offload_gb",
        )
    is_small = model.num_parameters * dtype.itemsize < _SINGLE_THREAD_WEIGHT_BYTES
    max_model_len = _max_model_len(config, model)
    return EngineLimits(
        device=device,
        dtype=dtype,
        kv_dtype=dtype if config.kv_cache_dtype == "auto" else torch.float8_e4m3fn,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_graph_rows=min(
            config.max_cudagraph_capture_size or config.max_num_seqs, config.max_num_seqs
        ),
        max_num_batched_tokens=_max_num_batched_tokens(config, max_model_len, on_gpu=on_gpu),
        num_threads=config.num_threads or (1 if is_small and not on_gpu else None),
        attention_backend=_attention_backend(config, model, machine, dtype, on_gpu=on_gpu),
    )


def _attention_backend(
    config: EngineConfig,
    model: ModelConfig,
    machine: Machine,
    dtype: torch.dtype,
    *,
    on_gpu: bool,
) -> AttentionBackend | None:
    asked = config.attention_backend
    if not on_gpu:
        if asked == "auto":
            return None
        found = ["a GPU"]
    else:
        facts = Facts(machine.capability, dtype, model.head_size)
        if asked == "auto":
            return fastest(facts)
        found = obstacles(asked, facts)
        if not found:
            return asked
    problem = " and ".join(found)
    raise ConfigError(f"--attention-backend {asked} needs {problem}.", param="attention_backend")


def _check_no_float8(config: EngineConfig, model: ModelConfig) -> None:
    major, minor = _FLOAT8_CAPABILITY
    needs = f"needs GPUs of compute capability {major}.{minor} or higher"
    if config.kv_cache_dtype != "auto":
        raise ConfigError(
            f"--kv-cache-dtype {config.kv_cache_dtype} {needs}.", param="kv_cache_dtype"
        )
    if model.quantization is not None and model.quantization.is_float8:
        raise ConfigError(f"A model in 8-bit floats {needs}.", param="quantization")


def _device(name: str, machine: Machine, num_ranks: int) -> torch.device:
    if name == "auto":
        name = "cuda" if machine.num_gpus else "cpu"
    device = torch.device(name)
    if device.type != "cuda":
        return device
    index = device.index or 0
    if index >= machine.num_gpus:
        raise ConfigError(
            f"--device {name}: this process sees {machine.num_gpus} GPUs.", param="device"
        )
    if index + num_ranks > machine.num_gpus:
        raise ConfigError(
            f"--tensor-parallel-size {num_ranks} from cuda:{index} on: this process sees "
            f"{machine.num_gpus} GPUs.",
            param="tensor_parallel_size",
        )
    return torch.device("cuda", index)


def _dtype(name: str, model: ModelConfig, machine: Machine, *, on_gpu: bool) -> torch.dtype:
    if name != "auto":
        return _DTYPES[name]
    stored = _DTYPES[model.torch_dtype]
    if on_gpu or (stored == torch.bfloat16 and machine.cpu_is_fast_at_bfloat16):
        return stored
    return torch.float32


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    longest = model.longest_context
    asked = config.max_model_len or longest
    if asked > longest:
        raise ConfigError(
            f"--max-model-len {asked} exceeds the {longest} tokens this model was built for.",
            param="max_model_len",
        )
    return asked


def _max_num_batched_tokens(config: EngineConfig, max_model_len: int, *, on_gpu: bool) -> int:
    asked = config.max_num_batched_tokens
    if asked is None:
        asked = _GPU_BATCHED_TOKENS if on_gpu else _CPU_BATCHED_TOKENS
    # More never come together, and nothing is sized for steps that cannot be.
    most = min(asked, config.max_num_seqs * max_model_len)
    if on_gpu and most > _MOST_GPU_TOKENS:
        raise ConfigError(
            f"--max-num-batched-tokens {asked}: a step on a GPU has at most {_MOST_GPU_TOKENS}.",
            param="max_num_batched_tokens",
        )
    return most
