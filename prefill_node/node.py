"""One prefill node, put together: engine, scheduler, sender, services, membership."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from cluster.node import NodeRole
from cluster.proto import node_pb2_grpc
from cluster.rpc import open_channel
from engine.load import LoadSnapshot
from node_parts.wiring import NodeParts, run_role
from prefill_node.fetch_estimate import FetchEstimate
from prefill_node.layer_groups import CPU_GROUP_BYTES, GPU_GROUP_BYTES
from prefill_node.loop import LayerFacts, PrefillObserver
from prefill_node.measuring import ScratchSender
from prefill_node.metrics import FetchCollector
from prefill_node.prefix_fetches import PrefixFetches
from prefill_node.scheduler import PrefillScheduler
from prefill_node.service import PrefillHandler

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc
    from prometheus_client import CollectorRegistry

    from cluster.config import LoadedConfig
    from cluster.member import Member, MemberSources
    from cluster.node import NodeLoad
    from cluster.startup import StartupReport
    from engine.engine import Engine
    from kv_transfer.agent import TransferAgent
    from kv_transfer.receiving.receiver import KVReceiver


NUM_FETCH_SLOTS = 2  # staging slots for prefixes that come here


class PrefillNode:
    """Prompts are computed here and handed off. Build it on the event loop."""

    def __init__(self, parts: NodeParts) -> None:
        self.parts = parts
        self.info = parts.info
        engine = parts.engine
        scheduler = PrefillScheduler(
            engine.block_manager, engine.max_num_batched_tokens, engine.max_num_seqs
        )
        self._snapshot = LoadSnapshot(scheduler, engine.block_manager)
        self.handler = PrefillHandler(engine, scheduler, parts.hub)
        self._observer = PrefillObserver(
            engine.block_manager,
            asyncio.get_running_loop(),
            self._snapshot,
            layers=_layer_facts(engine, parts.agent),
            on_scheduled=self.handler.on_scheduled,
            on_layers=self.handler.on_layers,
            on_step=self.handler.on_step,
        )
        parts.run_engine(scheduler, self._observer, self._observer.layer_hook)
        self._scratch = ScratchSender(
            engine.block_manager, parts.loop, self.handler, is_idle=self._is_idle
        )
        parts.open_sender(self._scratch.events)
        self._scratch.bind(parts.sender)
        self.fetches: PrefixFetches | None = None
        self._receiver: KVReceiver | None = None
        if parts.fetches_prefixes:
            self.fetches = PrefixFetches(
                parts.info.id, engine.block_manager, FetchEstimate(), open_channel
            )
            self._receiver = parts.new_receiver(
                self.fetches.incoming, agent=parts.agent.beside(NUM_FETCH_SLOTS)
            )

    def sources(self, on_replaced: Callable[[], None]) -> MemberSources:
        """What its membership tells the cluster."""
        return self.parts.sources(load=self._load, is_idle=self._is_idle, on_replaced=on_replaced)

    def add_services(self, server: grpc.aio.Server, member: Member) -> None:
        self.parts.add_services(server, member, self.handler, self._receiver)
        node_pb2_grpc.add_MeasuringServicer_to_server(self._scratch, server)  # type: ignore[no-untyped-call]

    def add_metrics(self, registry: CollectorRegistry, sources: MemberSources) -> None:
        self.parts.add_metrics(registry, sources)
        if self.fetches is not None:
            registry.register(FetchCollector(self.fetches.stats))

    async def start(self, member: Member) -> None:
        parts = self.parts
        self.handler.bind(parts.loop, self._observer, parts.sender, member, self.fetches)
        if self.fetches is not None and self._receiver is not None:
            self.fetches.bind(parts.loop, self._receiver, lambda: member.info.grpc_address)
            await self._receiver.start()
        parts.loop.start()
        await parts.sender.start()

    async def close(self) -> None:
        if self.fetches is not None and self._receiver is not None:
            await self._receiver.close()
            await self.fetches.close()
        await self.parts.sender.close()
        await self.parts.close()

    def _is_idle(self) -> bool:
        """Nothing is to be computed or sent. Of prompts and prefixes that have ended, blocks may be
        held, but no send gives these back."""
        return self.handler.num_prompts + self.parts.num_to_send == 0

    def _load(self) -> NodeLoad:
        sender = self.parts.sender
        return replace(
            self._snapshot.value,
            num_transfers=sender.num_transfers,
            num_quarantined_blocks=sender.num_quarantined_blocks,
        )


def _layer_facts(engine: Engine, agent: TransferAgent) -> LayerFacts:
    on_gpu = engine.limits.on_gpu
    return LayerFacts(
        num_layers=agent.pool.num_layers,
        unit_bytes=agent.pool.unit_bytes,
        group_bytes=GPU_GROUP_BYTES if on_gpu else CPU_GROUP_BYTES,
        record=_record if on_gpu else lambda: None,
    )


def _record() -> torch.Event:
    """An event behind what this thread has queued."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


async def run_prefill_node(loaded: LoadedConfig, report: StartupReport) -> None:
    """Serve until told to stop. Raises `ConfigError` for what keeps it from serving."""
    await run_role(NodeRole.PREFILL, PrefillNode, loaded, report)
