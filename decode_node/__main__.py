"""`baton decode`: start one decode node."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cluster.node import NodeRole
from cluster.node_process import node_main
from cluster.performance_mode import presets_of
from engine.config import EngineConfig
from kv_transfer.config import KVTransferConfig

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    return node_main(
        NodeRole.DECODE,
        (EngineConfig, KVTransferConfig),
        argv,
        "decode_node.node:run_decode_node",
        presets=presets_of(NodeRole.DECODE),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
