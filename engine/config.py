"""The options of an engine. Names and meanings are vLLM's where vLLM has the option."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 (flags derive from the types at run time)
from typing import Literal

from cluster.options import option, refused
from cluster.performance_mode import HELP as PERFORMANCE_MODE_HELP
from cluster.performance_mode import PerformanceMode
from engine.models.quantization import QuantizationMethod  # noqa: TC001

DType = Literal["auto", "bfloat16", "float16", "float32"]
LoadFormat = Literal["auto", "dummy"]
AttentionBackendChoice = Literal["auto", "gluon", "triton"]
KVCacheDType = Literal["auto", "fp8", "fp8_e4m3"]

MAX_ROWS = 1 << 16  # what is kept of each row of a step is allocated at start
MAX_THREADS = 1 << 10
MAX_GIB = 1 << 20  # of host memory
_MODEL = "Model"
_CACHE = "KV cache"
_STEP = "Steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One engine: which model, on which device, within which limits.

    None means "resolved at start": from the checkpoint, the device or the memory found.
    """

    model: Path = option(
        help="Folder of a Hugging Face checkpoint.", group=_MODEL, metavar="FOLDER"
    )
    dtype: DType = option(
        "auto",
        help="Type of weights, activations and KV. auto: the checkpoint's; on a CPU that is slow "
        "at it, float32.",
        group=_MODEL,
    )
    load_format: LoadFormat = option(
        "auto",
        help="dummy: random weights from config.json alone, for benchmarks.",
        group=_MODEL,
        advanced=True,
    )
    quantization: QuantizationMethod | None = option(
        None,
        help="How the matrices are quantised. Default: as the checkpoint says. fp8 also quantises "
        "a checkpoint that is not, while it is loaded; any other method must be the checkpoint's.",
        group=_MODEL,
        short="-q",
    )
    device: str = option(
        "auto", help="auto, cpu, cuda or cuda:N. auto: a GPU if there is one.", group=_MODEL
    )
    tensor_parallel_size: int = option(
        1,
        help="Split the model over this many GPUs of the machine, from the device on.",
        group=_MODEL,
        short="-tp",
        aliases=("--tp-size",),
    )
    max_model_len: int | None = option(
        None,
        help="Longest prompt plus output, in tokens. Default: what the model was built for.",
        group=_MODEL,
    )
    seed: int = option(0, help="Seed of dummy weights.", group=_MODEL, advanced=True)
    num_threads: int | None = option(
        None,
        help="CPU threads of one step. Default: 1 for weights below 64 MiB, else torch's choice; "
        "with `baton serve` each node's share of the cores.",
        group=_STEP,
        advanced=True,
    )
    kv_cache_dtype: KVCacheDType = option(
        "auto",
        help="Type of the KV cache. auto: as dtype. fp8 and fp8_e4m3: 8-bit floats, divided by "
        "the checkpoint's scales of KV where it has them; all nodes must agree.",
        group=_CACHE,
    )
    cpu_offload_gb: float = option(
        0.0,
        help="GiB of the GPU's memory to free by keeping layers' weights in main memory. Each step "
        "fetches them: it takes at least their bytes over the rate of the bus.",
        group=_MODEL,
    )
    gpu_memory_utilization: float = option(
        0.9,
        help="Share of the GPU's memory this engine may use for weights, workspace and KV.",
        group=_CACHE,
    )
    kv_cache_memory_bytes: int | None = option(
        None,
        help="Size of the KV pool in bytes. Default on a GPU: what gpu-memory-utilization leaves; "
        "on a CPU: 256 MiB, more where one sequence of max-model-len needs it.",
        group=_CACHE,
    )
    kv_offloading_size: float = option(
        0.0,
        help="GiB of host memory, pinned on a GPU, for KV that the pool has no room for: cached "
        "blocks go there before they are evicted, preempted sequences with all of theirs, and "
        "both come back without being computed again.",
        group=_CACHE,
    )
    block_size: int = option(16, help="Tokens of one KV block.", group=_CACHE)
    num_gpu_blocks_override: int | None = option(
        None, help="Exact number of KV blocks, for tests.", group=_CACHE, advanced=True
    )
    enable_prefix_caching: bool = option(
        True, help="Reuse the KV of prompts that begin alike.", group=_CACHE
    )
    max_num_seqs: int = option(256, help="Most sequences in one step.", group=_STEP)
    max_num_batched_tokens: int | None = option(
        None,
        help="Most tokens in one step. Default on a GPU: 8192 of a prefill node, 2048 of a decode "
        "node; on a CPU: 512.",
        group=_STEP,
    )
    performance_mode: PerformanceMode = option("balanced", help=PERFORMANCE_MODE_HELP, group=_STEP)
    max_cudagraph_capture_size: int | None = option(
        None,
        help="Most rows of a step that a CUDA graph is captured for: sequences that decode, or "
        "tokens that a cached prompt lacks. Default: 64 of a prefill node, max-num-seqs of a "
        "decode node.",
        group=_STEP,
        advanced=True,
    )
    attention_backend: AttentionBackendChoice = option(
        "auto",
        help="Kernel of attention to prompts on a GPU. auto: the fastest that runs here: gluon on "
        "Hopper GPUs for 16-bit models with heads of 64 or 128, else triton.",
        group=_STEP,
        advanced=True,
    )
    enforce_eager: bool = option(
        False, help="Do not use CUDA graphs for decode steps.", group=_STEP, advanced=True
    )

    def __post_init__(self) -> None:
        _check_device(self.device)
        for name in ("cpu_offload_gb", "kv_offloading_size"):
            if not 0.0 <= getattr(self, name) <= MAX_GIB:
                raise refused(name, f"must be in [0, {MAX_GIB}]")
        if self.kv_offloading_size and not self.enable_prefix_caching:
            raise refused("kv_offloading_size", "needs prefix caching: it finds blocks by content")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise refused("gpu_memory_utilization", "must be in (0, 1]")
        if self.block_size not in (8, 16, 32, 64, 128):
            raise refused("block_size", "must be 8, 16, 32, 64 or 128")
        for name in (
            "tensor_parallel_size",
            "max_model_len",
            "num_threads",
            "kv_cache_memory_bytes",
            "num_gpu_blocks_override",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_cudagraph_capture_size",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise refused(name, "must be at least 1")
        for name, most in (("max_num_seqs", MAX_ROWS), ("num_threads", MAX_THREADS)):
            if (getattr(self, name) or 0) > most:
                raise refused(name, f"must be at most {most}")


def _check_device(device: str) -> None:
    kind, _, index = device.partition(":")
    if kind == "cuda" and (not index or index.isdecimal()) and device != "cuda:":
        return
    if device not in ("auto", "cpu"):
        raise refused("device", "must be auto, cpu, cuda or cuda:N")
