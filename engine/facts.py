"""What a node tells of the engine it runs: the cluster, and whoever reads its metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.codec import PROTOCOL_VERSION
from cluster.node import NodeInfo, NodeState

if TYPE_CHECKING:
    from cluster.node import NodeId, NodeRole
    from engine.engine import Engine


def node_info(
    node: NodeId, role: NodeRole, engine: Engine, *, fetches_prefixes: bool = False
) -> NodeInfo:
    """The node's entry before it serves: STARTING, without addresses.

    The model's name is that of its folder; what separates models is the compatibility hash,
    which covers the weights themselves, the KV layout and the protocol.
    """
    return NodeInfo(
        id=node,
        role=role,
        state=NodeState.STARTING,
        grpc_address="",
        metrics_address="",
        model_name=engine.config.model.resolve().name,
        compatibility_hash=engine.kv_layout.compatibility_hash(
            engine.weights_fingerprint, PROTOCOL_VERSION
        ),
        block_size=engine.block_manager.block_size,
        max_model_len=engine.max_model_len,
        fetches_prefixes=fetches_prefixes,
    )


def engine_choices(engine: Engine) -> dict[str, str]:
    """What the engine decided at start, for metrics."""
    limits = engine.limits
    return {
        "device": limits.device.type,
        "dtype": str(limits.dtype).removeprefix("torch."),
        "kv_dtype": str(limits.kv_dtype).removeprefix("torch."),
        "attention_backend": limits.attention_backend or "torch",
    }
