"""How many KV blocks fit, with the arithmetic when one sequence does not.

On a GPU, `--gpu-memory-utilization` of its memory is this engine's share, whoever else is on
it: weights, the workspace a full step needs (measured), what lives outside torch's allocator,
and the KV pool, which gets the rest. On a CPU there is no such share: the pool is small by
default and grows to what one sequence needs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.kv_cache import KVLayout

GIB = 1 << 30
DEFAULT_CPU_POOL_BYTES = 256 << 20
# The CUDA context (526 MiB on an H200), and images of kernels.
OUTSIDE_ALLOCATOR_BYTES = 704 << 20
# What NCCL and the mappings of other ranks' memory take besides.
OUTSIDE_OF_RANKS_BYTES = 800 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class KVNeed:
    """What the pool must hold at least, one sequence of `max_model_len`; and at most."""

    block_bytes: int
    block_size: int
    max_model_len: int
    max_num_seqs: int

    @property
    def blocks_of_one(self) -> int:
        return -(-self.max_model_len // self.block_size)

    @property
    def bytes_of_one(self) -> int:
        return self.blocks_of_one * self.block_bytes

    @property
    def bytes_of_all(self) -> int:
        return self.max_num_seqs * self.bytes_of_one

    def longest_within(self, pool_bytes: int) -> int:
        """Tokens of the longest sequence that a pool of this size holds."""
        return max(0, pool_bytes // self.block_bytes * self.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """Bytes of one GPU as this engine sees them after its weights are loaded and a full step
    was measured."""

    total: int
    free: int  # now, with the weights in place
    weights: int
    workspace: int


def num_blocks_on_gpu(config: EngineConfig, need: KVNeed, memory: GpuMemory) -> int:
    given = _given_blocks(config, need, memory.free - memory.workspace, "the GPU")
    if given is not None:
        return given
    share = int(memory.total * config.gpu_memory_utilization)
    beside = memory.workspace + OUTSIDE_ALLOCATOR_BYTES
    if config.tensor_parallel_size > 1:
        beside += OUTSIDE_OF_RANKS_BYTES
    pool = share - memory.weights - beside
    if pool < need.bytes_of_one:
        raise _does_not_fit(config, need, memory, beside, pool)
    if pool > memory.free - memory.workspace:
        raise ConfigError(
            f"--gpu-memory-utilization {config.gpu_memory_utilization} asks for {shown(pool)} "
            f"of KV beside {shown(memory.weights)} of weights, but only {shown(memory.free)} of "
            f"the GPU's {shown(memory.total)} are free: lower it, or stop what else uses this "
            f"GPU.",
            param="gpu_memory_utilization",
        )
    return pool // need.block_bytes


def num_blocks_on_cpu(config: EngineConfig, need: KVNeed, *, available_bytes: int) -> int:
    """`available_bytes`: main memory that is free once the weights are loaded."""
    given = _given_blocks(config, need, available_bytes, "this machine")
    if given is not None:
        return given
    most = available_bytes // 2
    if need.bytes_of_one > most:
        raise ConfigError(
            f"The KV of one sequence of {need.max_model_len} tokens takes "
            f"{shown(need.bytes_of_one)}, more than half of the {shown(available_bytes)} of "
            f"memory that is free. Lower --max-model-len to at most "
            f"{need.longest_within(most)}, or set --kv-cache-memory-bytes.",
            param="max_model_len",
        )
    pool = max(min(DEFAULT_CPU_POOL_BYTES, need.bytes_of_all, most), need.bytes_of_one)
    return pool // need.block_bytes


def num_host_blocks(config: EngineConfig, layout: KVLayout) -> int:
    """Blocks of `layout`, the whole of all ranks, that host memory is to keep."""
    asked = int(config.kv_offloading_size * GIB)
    available = available_main_memory() if asked else 0
    if asked > available:
        raise ConfigError(
            f"--kv-offloading-size asks for {shown(asked)} of host memory, but this machine has "
            f"{shown(available)} free.",
            param="kv_offloading_size",
        )
    if 0 < asked < layout.block_bytes:
        raise ConfigError(
            f"--kv-offloading-size is {shown(asked)}, but one KV block takes "
            f"{shown(layout.block_bytes)}.",
            param="kv_offloading_size",
        )
    return asked // layout.block_bytes


def check_weights_fit(weights_bytes: int, free_bytes: int, where: str) -> None:
    """Before loading: half an answer now instead of a crash minutes later."""
    if weights_bytes > free_bytes:
        raise ConfigError(
            f"The weights take {shown(weights_bytes)}, but {where} has {shown(free_bytes)} free.",
            param="model",
        )


def available_main_memory() -> int:
    """Bytes that can be had without swapping, bounded by this process's control group."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = _table_of(Path("/proc/meminfo"))
    if "MemAvailable:" in meminfo:
        free = meminfo["MemAvailable:"] * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = (_number_in(group / name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None:
        return free
    # Files that were read, checkpoints above all, count as used but make room when asked.
    pages = _table_of(group / "memory.stat")
    used -= pages.get("inactive_file", 0) + pages.get("active_file", 0)
    return max(0, min(free, limit - used))


def shown(num_bytes: int) -> str:
    if num_bytes >= GIB:
        return f"{num_bytes / GIB:.2f} GiB"
    if num_bytes >= 1 << 20:
        return f"{num_bytes / (1 << 20):.1f} MiB"
    return f"{num_bytes / 1024:.1f} KiB"


def _number_in(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else None


def _table_of(path: Path) -> dict[str, int]:
    """The lines "name number ..." of a file of the kernel; empty where there is no such file."""
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [line.split() for line in lines]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _given_blocks(config: EngineConfig, need: KVNeed, free_bytes: int, where: str) -> int | None:
    """The blocks that the configuration names, None when it leaves them to the engine."""
    if config.num_gpu_blocks_override is not None:
        name, num_blocks = "num_gpu_blocks_override", config.num_gpu_blocks_override
    elif config.kv_cache_memory_bytes is not None:
        name = "kv_cache_memory_bytes"
        num_blocks = _blocks_of_given_pool(config.kv_cache_memory_bytes, need)
    else:
        return None
    if num_blocks * need.block_bytes > free_bytes:
        raise ConfigError(
            f"--{name.replace('_', '-')} asks for {shown(num_blocks * need.block_bytes)} of KV, "
            f"but {where} has {shown(max(0, free_bytes))} free.",
            param=name,
        )
    return num_blocks


def _blocks_of_given_pool(pool_bytes: int, need: KVNeed) -> int:
    if pool_bytes < need.bytes_of_one:
        longest = need.longest_within(pool_bytes)
        lower = f"lower --max-model-len to at most {longest}, or " if longest else ""
        raise ConfigError(
            f"--kv-cache-memory-bytes is {shown(pool_bytes)}, but the KV of one sequence of "
            f"{need.max_model_len} tokens takes {shown(need.bytes_of_one)}: {lower}raise it to at "
            f"least {need.bytes_of_one}.",
            param="kv_cache_memory_bytes",
        )
    return pool_bytes // need.block_bytes


def _does_not_fit(
    config: EngineConfig, need: KVNeed, memory: GpuMemory, beside: int, pool: int
) -> ConfigError:
    wanted = memory.weights + beside + need.bytes_of_one
    share = wanted - need.bytes_of_one + pool
    remedies = []
    longest = need.longest_within(pool)
    if longest:
        remedies.append(f"lower --max-model-len to at most {longest}")
    least = wanted / memory.total
    if least <= 1:
        remedies.append(f"raise --gpu-memory-utilization to at least {least + 0.005:.2f}")
    if not remedies:
        remedies.append("use a GPU with more memory or a smaller model")
    return ConfigError(
        f"Weights {shown(memory.weights)} + workspace {shown(beside)} + KV of one sequence of "
        f"{need.max_model_len} tokens {shown(need.bytes_of_one)} = {shown(wanted)}, but "
        f"--gpu-memory-utilization {config.gpu_memory_utilization} of {shown(memory.total)} is "
        f"{shown(share)}: {', or '.join(remedies)}.",
        param="max_model_len",
    )
