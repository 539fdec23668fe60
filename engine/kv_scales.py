"""Scales of an FP8 KV cache, as checkpoints bring them: stored value = key / k_scale.

Exporters name them differently, and most give one number for all heads of a layer. A layer without
them has 1.0: keys and values of these families seldom exceed 448.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from engine.stored_matrices import FLOATS, bad
from engine.weight_views import cut

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from engine.stored_matrices import Read, TensorHeader
    from engine.tensor_parallel.shard import Shard

KV_SCALE_KINDS = frozenset(("k_scale", "v_scale"))
# Of `<layer>.self_attn`, the first that is there: llm-compressor, ModelOpt and others, early
# compressed-tensors, AutoFP8.
_NAMES = {
    kind: (kind, f"{side}_proj.{kind}", f"{side}_proj.output_scale", "kv_scale")
    for kind, side in (("k_scale", "k"), ("v_scale", "v"))
}
_KNOWN = re.compile(r"\.self_attn\.(kv_scale|([kv])_scale|([kv])_proj\.([kv]_scale|output_scale))$")


def is_kv_scale(name: str) -> bool:
    """Whether a checkpoint's tensor is such a scale."""
    return _KNOWN.search(name) is not None


def fill_kv_scales(
    module: str,
    views: Mapping[str, torch.Tensor],
    headers: Mapping[str, TensorHeader],
    read: Read,
    shard: Shard,
) -> None:
    """Fill the views `k_scale` and `v_scale`, float32 `[num_kv_heads]`, of a layer's attention."""
    for kind in KV_SCALE_KINDS:
        view = views[kind]
        found = (f"{module}.{name}" for name in _NAMES[kind])
        name = next((name for name in found if name in headers), None)
        if name is None:
            view.fill_(1.0)
            continue
        if headers[name].dtype not in FLOATS:
            raise bad(f"{name} is stored as {headers[name].dtype}")
        scales = read(name).float().flatten()
        num_heads = len(view) * shard.size
        if len(scales) not in (1, num_heads):
            raise bad(f"{name} has {len(scales)} scales for {num_heads} key/value heads")
        if not (scales.isfinite() & (scales > 0)).all():
            raise bad(f"{name} is not a positive number")
        view.copy_(cut(f"{module}.{kind}", scales.expand(num_heads), shard))
