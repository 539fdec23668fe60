"""A node's program as `baton` starts it, with a KV link that a test can spoil (`kv_link`), and a
witness of what it does to blocks (`witness`)."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from kv_transfer.agent import TransferAgent
    from kv_transfer.config import KVTransferConfig

ORDERS_VARIABLE = "BATON_TEST_KV_ORDERS"
PLAIN_VARIABLE = "BATON_TEST_PLAIN_LINKS"  # no link follows orders: payloads go as they always do
EAGER_VARIABLE = "BATON_TEST_EAGER"
BLIND_VARIABLE = "BATON_TEST_BLIND"  # accept any digest: the control of what digests are for


def spoil_links(folder: str) -> None:
    """Every agent that is made from here on sends through links that follow our orders: between
    GPUs, too, where receivers would else read a sender's slots themselves."""
    from kv_transfer.agent import TransferAgent
    from tests.faults.kv_link import SpoiledTransport

    create = TransferAgent.create.__func__  # type: ignore[attr-defined]

    def spoiled(
        cls: type[TransferAgent], pools: Sequence[torch.Tensor], config: KVTransferConfig
    ) -> TransferAgent:
        agent: TransferAgent = create(cls, pools, config)
        agent.transport = SpoiledTransport(agent.transport, folder)
        agent.map_slots = lambda _: ()  # type: ignore[assignment, method-assign]
        return agent

    TransferAgent.create = classmethod(spoiled)  # type: ignore[assignment, method-assign]


def watch_blocks(folder: str) -> None:
    from tests.faults.watched_node import watch

    watch(Path(folder))


def accept_any_digest() -> None:
    """Of nodes in host memory."""
    from kv_transfer.receiving.arrivals import PiecesArrival

    def accept(_: PiecesArrival) -> asyncio.Future[bool]:
        verdict: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        verdict.set_result(True)
        return verdict

    PiecesArrival.place = accept  # type: ignore[assignment, method-assign]


def fetch_whatever_is_cached() -> None:
    """Prefixes come from a peer, and out of its host memory, though a small model computes them
    sooner."""
    from prefill_node.fetch_estimate import FetchEstimate

    FetchEstimate.is_known = lambda *_: True  # type: ignore[method-assign]
    FetchEstimate.pays = lambda *_: True  # type: ignore[method-assign]
    FetchEstimate.restore_seconds_per_token = lambda *_: 1.0  # type: ignore[method-assign]


def main() -> int:
    if folder := os.environ.get(ORDERS_VARIABLE):
        if not os.environ.get(PLAIN_VARIABLE):
            spoil_links(folder)
        watch_blocks(folder)
    if os.environ.get(BLIND_VARIABLE):
        accept_any_digest()
    if os.environ.get(EAGER_VARIABLE):
        fetch_whatever_is_cached()
    from baton.__main__ import main as baton

    result: object = baton()
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
