"""The KV pool, sized by what the weights and the largest steps leave of the memory.

1. On a GPU the workspace is measured (`workspace.py`), with one block for the pool; on a CPU the
   options and the main memory say how much there may be.
2. The pool takes the rest (`memory.py`); that of several ranks as much as the poorest has.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from engine import memory
from engine.host_copier import device_bytes
from engine.kv_cache import KVCache, KVLayout
from engine.model_runner import ModelRunner
from engine.workspace import measure_workspace

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.limits import EngineLimits
    from engine.models.config import ModelConfig
    from engine.models.decoder import Decoder
    from engine.sampler import Sampler
    from engine.tensor_parallel.seat import Seat

logger = logging.getLogger(__name__)


def layout_of(model: ModelConfig, config: EngineConfig, limits: EngineLimits) -> KVLayout:
    """Of the whole model, whatever the ranks."""
    return KVLayout(
        num_layers=model.num_layers,
        block_size=config.block_size,
        num_kv_heads=model.num_kv_heads,
        head_size=model.head_size,
        dtype=limits.kv_dtype,
    )


def allocate_kv(
    config: EngineConfig,
    limits: EngineLimits,
    layout: KVLayout,
    decoder: Decoder,
    sampler: Sampler | None,
    others_bytes: int,
    seat: Seat | None,
) -> tuple[KVCache, tuple[torch.Tensor, ...]]:
    """The pool of this rank, of which `layout` describes the whole; and, on rank 0 of several,
    those of all ranks as bytes."""
    layout = layout if seat is None else layout.shard(seat.shard.size)
    need = memory.KVNeed(
        block_bytes=layout.block_bytes,
        block_size=layout.block_size,
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
    )
    num_blocks = _num_blocks(config, limits, need, layout, decoder, sampler, others_bytes)
    if seat is None:
        return KVCache.allocate(layout, num_blocks, limits.device), ()
    return seat.allocate_kv(layout, num_blocks, limits.device)


def _num_blocks(
    config: EngineConfig,
    limits: EngineLimits,
    need: memory.KVNeed,
    layout: KVLayout,
    decoder: Decoder,
    sampler: Sampler | None,
    others_bytes: int,
) -> int:
    device = limits.device
    if not limits.on_gpu:
        available = memory.available_main_memory() // config.tensor_parallel_size
        return memory.num_blocks_on_cpu(config, need, available_bytes=available)
    torch.cuda.empty_cache()
    weights_bytes = torch.cuda.memory_reserved(device) - others_bytes

    def build_runner(kv_cache: KVCache) -> ModelRunner:
        return ModelRunner(decoder, kv_cache, limits, sampler)

    one_block = KVCache.allocate(layout, 1, device)
    with torch.inference_mode():
        workspace = measure_workspace(
            decoder, one_block, limits, sampler, None if config.enforce_eager else build_runner
        )
    del one_block
    free, total = torch.cuda.mem_get_info(device)
    if config.kv_offloading_size:
        workspace += device_bytes(need.block_bytes * config.tensor_parallel_size)
    facts = memory.GpuMemory(total=total, free=free, weights=weights_bytes, workspace=workspace)
    num_blocks = memory.num_blocks_on_gpu(config, need, facts)
    logger.info(
        "memory of %s: weights %s, workspace %s, KV %s", device, memory.shown(weights_bytes),
        memory.shown(workspace), memory.shown(num_blocks * need.block_bytes),
    )  # fmt: skip
    return num_blocks
