"""One decode node, put together: engine, scheduler, receiver, services, membership."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from cluster.clock import monotonic
from cluster.codec import PROTOCOL_VERSION
from cluster.errors import InternalError
from cluster.member import MemberSources
from cluster.member_config import MemberConfig
from cluster.node import NodeRole
from cluster.node_process import run_node
from cluster.node_service import NodeService
from cluster.proto import node_pb2_grpc
from cluster.rpc import open_channel
from decode_node.loop import DecodeObserver
from decode_node.recompute import RecomputeBudget
from decode_node.reservations import Reservations
from decode_node.scheduler import DecodeScheduler
from decode_node.service import DecodeHandler
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


class DecodeNode:
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
        self.info = node_info(node_id, NodeRole.DECODE, engine, fetches_prefixes=fetches)
        self._agent = agent
        scheduler = DecodeScheduler(
            engine.block_manager,
            engine.max_num_batched_tokens,
            engine.max_num_seqs,
            max_model_len=engine.max_model_len,
        )
        reservations = Reservations(
            engine.block_manager,
            num_running=lambda: scheduler.num_running,
            num_preempted=lambda: scheduler.num_preempted,
        )
        self._snapshot = LoadSnapshot(
            scheduler,
            engine.block_manager,
            more_waiting=lambda: (reservations.num_waiting, reservations.queued_tokens),
        )
        budget = _recompute_budget(agent)
        self.handler = DecodeHandler(engine, scheduler, reservations, self.hub, budget)
        self.loop = self._make_loop(scheduler, reservations, on_fatal)
        self._connect(node_id)

    def _make_loop(
        self,
        scheduler: DecodeScheduler,
        reservations: Reservations,
        on_fatal: Callable[[BaseException], None],
    ) -> EngineLoop:
        """What ends the node is watched from here on."""
        observer = DecodeObserver(
            reservations,
            asyncio.get_running_loop(),
            self._snapshot,
            on_step=self.handler.on_step,
        )
        self.engine.watch(on_fatal)
        self._agent.quarantine.watch(lambda: on_fatal(InternalError("Too much KV memory is lost.")))
        return EngineLoop(
            self.engine,
            scheduler,
            observer,
            on_fatal=on_fatal,
            on_idle=self._snapshot.take,
            start_copies=self.engine.start_copies,
        )

    def _connect(self, node_id: NodeId) -> None:
        """The ends of its hand-offs: prompts come in, prefixes go out."""
        compatibility = Compatibility(PROTOCOL_VERSION, self.info.compatibility_hash)
        self._receiver = KVReceiver(
            node_id=node_id,
            compatibility=compatibility,
            agent=self._agent,
            source=self.handler,
            is_decoding=lambda: self.loop.is_busy,
        )
        self._prefixes = PrefixSender(self._hold_prefix, self.info.block_size)
        self._sender = KVSender(
            node_id=node_id,
            compatibility=compatibility,
            agent=self._agent,
            block_size=self.info.block_size,
            events=self._prefixes,
            open_channel=open_channel,
        )
        self._prefixes.bind(self._sender)

    def sources(self, on_replaced: Callable[[], None]) -> MemberSources:
        """What its membership tells the cluster."""
        return MemberSources(
            load=self._load,
            transports=lambda: self._agent.transports_in_use,
            cache_changes=cache_changes(self.loop, self.engine.block_manager),
            is_idle=self._is_idle,
            on_replaced=on_replaced,
            seconds_without_progress=lambda: self.loop.seconds_without_progress,
        )

    def add_services(self, server: grpc.aio.Server, member: Member) -> None:
        prefixes = self._prefixes if self._agent.config.fetch_prefixes else None
        service = NodeService(self.handler, self.hub, member, prefixes)
        node_pb2_grpc.add_NodeServicer_to_server(service, server)
        node_pb2_grpc.add_KvReceiverServicer_to_server(KvReceiverService(self._receiver), server)

    def add_metrics(self, registry: CollectorRegistry, sources: MemberSources) -> None:
        for collector in engine_collectors(self.engine, sources.load, self.loop.stats):
            registry.register(collector)
        registry.register(
            TransferCollector(self._agent.stats, transports=sources.transports, agent=self._agent)
        )

    async def start(self, member: Member) -> None:
        self._member = member
        self.handler.bind(self.loop, self._receiver, member)
        self.loop.start()
        await self._receiver.start()
        await self._sender.start()

    async def close(self) -> None:
        await self._sender.close()
        await self._receiver.close()
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

    def _is_idle(self) -> bool:
        num_transfers = self._receiver.num_transfers + self._sender.num_transfers
        return self.handler.num_streams == 0 and num_transfers == 0

    def _load(self) -> NodeLoad:
        return replace(
            self._snapshot.value,
            num_transfers=self._receiver.num_transfers,
            num_quarantined_blocks=self._receiver.num_quarantined_blocks,
        )


def _recompute_budget(agent: TransferAgent) -> RecomputeBudget:
    return RecomputeBudget(
        max_concurrent=agent.config.max_recomputes,
        tokens_per_second=agent.config.recompute_tokens_per_second,
        now=monotonic(),
    )


async def run_decode_node(loaded: LoadedConfig, report: StartupReport) -> None:
    """Serve until told to stop. Raises `ConfigError` for what keeps it from serving."""
    engine = Engine.create(loaded[EngineConfig], progress=report)
    with report.phase("open transport"):
        agent = TransferAgent.create(engine.kv_pools, loaded[KVTransferConfig])
    build = partial(DecodeNode, engine, agent)
    await run_node(NodeRole.DECODE, loaded[MemberConfig], report, build)
