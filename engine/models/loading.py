"""A model from its folder: facts, an empty decoder of the right kind, its weights.

1. `read_model` reads the checkpoint's facts and weighs them against `--quantization`.
2. `load_decoder` builds the decoder without memory first, to know what it takes; then on its
   device, where the loader fills it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from engine import checkpoint_files, memory, weights
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.quantization import resolve_quantization
from engine.models.quantized_linear import matrix_factory
from engine.offload import OffloadedLayers, offloaded_layers
from engine.tensor_parallel.shard import WHOLE

if TYPE_CHECKING:
    from cluster.startup import StartupReport
    from engine.checkpoint_files import Checkpoint
    from engine.config import EngineConfig
    from engine.limits import EngineLimits
    from engine.tensor_parallel.ranks import Ranks

logger = logging.getLogger(__name__)


def read_model(config: EngineConfig) -> ModelConfig:
    """Raises `ConfigError` when this engine cannot run the model, or not as it was asked to."""
    model = ModelConfig.from_folder(config.model)
    quantization = resolve_quantization(config.quantization, model.quantization)
    return replace(model, quantization=quantization)


def load_decoder(
    config: EngineConfig,
    model: ModelConfig,
    limits: EngineLimits,
    progress: StartupReport,
    ranks: Ranks | None,
) -> tuple[Decoder, str]:
    """The decoder with its weights, or its shard of them, in place; the fingerprint of all."""
    shard = WHOLE if ranks is None else ranks.shard
    is_dummy = config.load_format == "dummy"
    checkpoint = None if is_dummy else checkpoint_files.open_checkpoint(config.model)
    nowhere = _empty_decoder(model, checkpoint, limits, torch.device("meta"), ranks)
    weights_bytes = sum(map(weights.num_bytes, nowhere.checkpoint_views().values()))
    offloaded = _offloaded(config, nowhere, limits)
    _check_fits(weights_bytes, offloaded, limits)
    decoder = _empty_decoder(model, checkpoint, limits, limits.device, ranks, offloaded)
    views = decoder.checkpoint_views()
    with progress.phase("load weights", total=weights_bytes) as phase:
        if checkpoint is None:
            weights.fill_dummy(views, config.seed, phase, shard)
            fingerprint = checkpoint_files.dummy_fingerprint(model, config.seed)
        else:
            weights.load_weights(checkpoint, views, phase, model.quantization, shard)
            fingerprint = checkpoint_files.fingerprint(model, checkpoint)
        views.clear()
        decoder.pack()
    if offloaded is not None:
        logger.info("offloaded %s", offloaded.shown())
    return decoder, fingerprint


def _offloaded(
    config: EngineConfig, nowhere: Decoder, limits: EngineLimits
) -> OffloadedLayers | None:
    layer_bytes = nowhere.layer_bytes()
    indices = offloaded_layers(config.cpu_offload_gb, layer_bytes)
    if not indices:
        return None
    return OffloadedLayers({index: layer_bytes[index] for index in indices}, limits.device)


def _check_fits(
    weights_bytes: int, offloaded: OffloadedLayers | None, limits: EngineLimits
) -> None:
    if not limits.on_gpu:
        memory.check_weights_fit(weights_bytes, memory.available_main_memory(), "this machine")
        return
    if offloaded is not None:
        weights_bytes -= offloaded.freed_bytes
        available = memory.available_main_memory()
        memory.check_weights_fit(offloaded.layers_bytes, available, "main memory")
    memory.check_weights_fit(weights_bytes, torch.cuda.mem_get_info(limits.device)[0], "the GPU")


def _empty_decoder(
    model: ModelConfig,
    checkpoint: Checkpoint | None,
    limits: EngineLimits,
    device: torch.device,
    ranks: Ranks | None,
    offloaded: OffloadedLayers | None = None,
) -> Decoder:
    shard = WHOLE if ranks is None else ranks.shard
    plain = weights.plain_modules(checkpoint, model.quantization)
    quantization = model.quantization if limits.on_gpu else None
    return Decoder(
        shard.of_model(model),
        max_model_len=limits.max_model_len,
        dtype=limits.dtype,
        device=device,
        make_matrix=matrix_factory(quantization, plain, dtype=limits.dtype, device=device),
        kv_dtype=limits.kv_dtype,
        ranks=ranks,
        offloaded=offloaded,
        attention_backend=limits.attention_backend,
    )
