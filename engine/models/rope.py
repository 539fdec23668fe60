"""Rotary position tables.

Sources: RoFormer (Su et al. 2021) for the frequencies; the "llama3" rule as Meta released it
with Llama 3.1; YaRN (Peng et al. 2023) sections 3.2 to 3.4 for "yarn".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from engine.models.config import ModelConfig, RopeScaling


def cos_sin_cache(config: ModelConfig, max_len: int, device: torch.device) -> torch.Tensor:
    """float32 `[max_len, head_size]`: cos of each position's angles, then their sin."""
    frequencies, factor = _frequencies(config)
    positions = torch.arange(max_len, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    return torch.cat((angles.cos() * factor, angles.sin() * factor), dim=-1).to(device)


def _frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """float32 `[head_size / 2]` radians per position, and the factor of cos and sin."""
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.int64).float() / config.head_size
    plain = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    return _yarn(plain, config, scaling), _yarn_attention_factor(scaling)


def _llama3(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    trained = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / plain
    slowed = torch.where(wavelengths > trained / low, plain / scaling.factor, plain)
    blend = (trained / wavelengths - low) / (high - low)
    blended = (1 - blend) * slowed / scaling.factor + blend * slowed
    between = (wavelengths >= trained / high) & (wavelengths <= trained / low)
    return torch.where(between, blended, slowed)


def _yarn(plain: torch.Tensor, config: ModelConfig, scaling: RopeScaling) -> torch.Tensor:
    """Dimensions that turn often keep their frequency, those that hardly turn are slowed."""
    size = config.head_size

    def dimension_turning(rotations: float) -> float:
        trained = scaling.original_max_position_embeddings
        turns = math.log(trained / (rotations * 2 * math.pi))
        return size * turns / (2 * math.log(config.rope_theta))

    low, high = dimension_turning(scaling.beta_fast), dimension_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
