"""Which layers of a step are sent together.

One message a layer would be many small ones for a short chunk; all layers in one would expose the
whole transfer behind the last kernel. So layers are sent in groups of about `GROUP_BYTES`, and
the last one goes alone: what a first token waits for is one layer of the last chunk.
"""

from __future__ import annotations

# Half of what a lone message moves at half the rate of NVLink, and several are in flight.
GPU_GROUP_BYTES = 16 << 20
CPU_GROUP_BYTES = 1 << 20


def group_ends(num_layers: int, layer_bytes: int, group_bytes: int) -> frozenset[int]:
    """Layers after which to send, counted from 1; none where the step is too small for groups.

    `layer_bytes`: what the step adds to one layer.
    """
    if layer_bytes * num_layers < 2 * group_bytes:
        return frozenset()
    size = max(1, -(-group_bytes // max(1, layer_bytes)))
    return frozenset((*range(size, num_layers, size), max(1, num_layers - 1), num_layers))
