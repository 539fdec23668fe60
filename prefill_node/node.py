"""One prefill node, put together: engine, scheduler, sender, services, membership."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from cluster.codec import PROTOCOL_VERSION
from cluster.errors import InternalError
from cluster.member import MemberSources
from cluster.member_config import MemberConfig
from cluster.node import NodeRole
from cluster.node_process import run_node
from cluster.node_service import NodeService
from cluster.proto import node_pb2_grpc
from cluster.rpc import open_channel
from engine.cache_report import cache_changes
from engine.config import EngineConfig
from engine.engine import Engine
from engine.facts import node_info
from engine.held_prefix import hold_prefix
from engine.load import LoadSnapshot
from engine.loop import EngineLoop
from engine.metrics import engine_collectors
from kv_transfer.agent import TransferAgent
from kv_transfer.config import KVTransferConfig
from kv_transfer.handshake import Compatibility
from kv_transfer.metrics import TransferCollector
from kv_transfer.receiving.kv_session import KvReceiverService
from kv_transfer.receiving.receiver import KVReceiver
from kv_transfer.sending.prefixes import HeldPrefix, PrefixSender
from kv_transfer.sending.sender import KVSender
from prefill_node.fetch_estimate import FetchEstimate
from prefill_node.layer_groups import CPU_GROUP_BYTES, GPU_GROUP_BYTES
from prefill_node.loop import LayerFacts, PrefillObserver
from prefill_node.metrics import FetchCollector
from prefill_node.prefix_fetches import PrefixFetches
from prefill_node.scheduler import PrefillScheduler
from prefill_node.service import PrefillHandler

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc
    from prometheus_client import CollectorRegistry

    from cluster.config import LoadedConfig
    from cluster.member import Member
    from cluster.node import NodeId, NodeLoad
    from cluster.request import SequenceRequest
    from cluster.rpc import SessionHub
    from cluster.startup import StartupReport


NUM_FETCH_SLOTS = 2  # staging slots for prefixes that come here


class PrefillNode:
    """The parts of one node and how they hear of each other. Build it on the event loop."""

    def __init__(
        self,
        engine: Engine,
        agent: TransferAgent,
        hub: SessionHub,
        node_id: NodeId,
        *,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self.engine = engine
        self.hub = hub
        fetches = agent.config.fetch_prefixes
        self.info = node_info(node_id, NodeRole.PREFILL, engine, fetches_prefixes=fetches)
        self._agent = agent
        scheduler = PrefillScheduler(
            engine.block_manager, engine.max_num_batched_tokens, engine.max_num_seqs
        )
        self._snapshot = LoadSnapshot(scheduler, engine.block_manager)
        self.handler = PrefillHandler(engine, scheduler, self.hub)
        self._observer = PrefillObserver(
            engine.block_manager,
            asyncio.get_running_loop(),
            self._snapshot,
            layers=_layer_facts(engine, agent),
            on_scheduled=self.handler.on_scheduled,
            on_layers=self.handler.on_layers,
            on_step=self.handler.on_step,
        )
        engine.watch(on_fatal)
        agent.quarantine.watch(lambda: on_fatal(InternalError("Too much KV memory is lost.")))
        self.loop = EngineLoop(
            engine,
            scheduler,
            self._observer,
            on_fatal=on_fatal,
            on_idle=self._snapshot.take,
            layer_hook=self._observer.layer_hook,
            start_copies=engine.start_copies,
        )
        self._connect(node_id)

    def _connect(self, node_id: NodeId) -> None:
        """The ends of its hand-offs: prompts and prefixes go out, prefixes come in if wanted."""
        compatibility = Compatibility(PROTOCOL_VERSION, self.info.compatibility_hash)
        self._prefixes = PrefixSender(self._hold_prefix, self.info.block_size, self.handler)
        self._sender = KVSender(
            node_id=node_id,
            compatibility=compatibility,
            agent=self._agent,
            block_size=self.info.block_size,
            events=self._prefixes,
            open_channel=open_channel,
        )
        self._prefixes.bind(self._sender)
        self.fetches: PrefixFetches | None = None
        self._receiver: KVReceiver | None = None
        if self._agent.config.fetch_prefixes:
            layout = self.engine.kv_layout
            estimate = FetchEstimate(layout.block_bytes / layout.block_size)
            manager = self.engine.block_manager
            self.fetches = PrefixFetches(node_id, manager, estimate, open_channel)
            self._receiver = KVReceiver(
                node_id=node_id,
                compatibility=compatibility,
                agent=self._agent.beside(NUM_FETCH_SLOTS),
                source=self.fetches,
            )

    def sources(self, on_replaced: Callable[[], None]) -> MemberSources:
        """What its membership tells the cluster."""
        return MemberSources(
            load=self._load,
            transports=lambda: self._agent.transports_in_use,
            cache_changes=cache_changes(self.loop, self.engine.block_manager),
            is_idle=lambda: self.handler.num_prompts + self._prefixes.num_given_away == 0,
            on_replaced=on_replaced,
            seconds_without_progress=lambda: self.loop.seconds_without_progress,
        )

    def add_services(self, server: grpc.aio.Server, member: Member) -> None:
        prefixes = self._prefixes if self._agent.config.fetch_prefixes else None
        service = NodeService(self.handler, self.hub, member, prefixes)
        node_pb2_grpc.add_NodeServicer_to_server(service, server)
        if self._receiver is not None:
            receiving = KvReceiverService(self._receiver)
            node_pb2_grpc.add_KvReceiverServicer_to_server(receiving, server)

    def add_metrics(self, registry: CollectorRegistry, sources: MemberSources) -> None:
        for collector in engine_collectors(self.engine, sources.load, self.loop.stats):
            registry.register(collector)
        registry.register(
            TransferCollector(self._agent.stats, transports=sources.transports, agent=self._agent)
        )
        if self.fetches is not None:
            registry.register(FetchCollector(self.fetches.stats))

    async def start(self, member: Member) -> None:
        self._member = member
        self.handler.bind(self.loop, self._observer, self._sender, member, self.fetches)
        if self.fetches is not None and self._receiver is not None:
            self.fetches.bind(self.loop, self._receiver, lambda: member.info.grpc_address)
            await self._receiver.start()
        self.loop.start()
        await self._sender.start()

    async def close(self) -> None:
        if self.fetches is not None and self._receiver is not None:
            await self._receiver.close()
            await self.fetches.close()
        await self._sender.close()
        self.loop.stop()
        await self._agent.close()
        self.engine.close()

    async def _hold_prefix(
        self, prefix: SequenceRequest, restore_seconds_per_token: float
    ) -> HeldPrefix:
        hold = await hold_prefix(
            self.loop,
            self.engine.restores,
            prefix,
            self._member.model_key,
            restore_seconds_per_token,
        )
        return HeldPrefix(hold.block_ids, lambda: self.loop.call(hold.release))

    def _load(self) -> NodeLoad:
        return replace(
            self._snapshot.value,
            num_transfers=self._sender.num_transfers,
            num_quarantined_blocks=self._sender.num_quarantined_blocks,
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
    event = torch.cuda.Event()
    event.record()
    return event


async def run_prefill_node(loaded: LoadedConfig, report: StartupReport) -> None:
    """Serve until told to stop. Raises `ConfigError` for what keeps it from serving."""
    engine = Engine.create(loaded[EngineConfig], progress=report)
    with report.phase("open transport"):
        agent = TransferAgent.create(engine.kv_pools, loaded[KVTransferConfig])
    build = partial(PrefillNode, engine, agent)
    await run_node(NodeRole.PREFILL, loaded[MemberConfig], report, build)
