"""What every node has around its engine: loop, sender, membership, services, metrics.

A role adds its scheduler, its handler and the other end of its hand-offs. Prefixes that other nodes
may have are given away by both roles, so that is here.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from cluster.codec import PROTOCOL_VERSION
from cluster.member import MemberSources
from cluster.member_config import MemberConfig
from cluster.message_size import message_limit
from cluster.node_process import run_node
from cluster.node_service import NodeService
from cluster.proto import node_pb2_grpc
from cluster.rpc import open_channel
from engine.cache_report import cache_changes
from engine.config import EngineConfig
from engine.engine import Engine
from engine.facts import node_info
from engine.held_prefix import hold_prefix
from engine.loop import EngineLoop
from engine.loop_errors import unawaited
from engine.metrics import engine_collectors
from kv_transfer.agent import TransferAgent
from kv_transfer.config import KVTransferConfig
from kv_transfer.handshake import Compatibility
from kv_transfer.metrics import TransferCollector
from kv_transfer.receiving.kv_session import KvReceiverService
from kv_transfer.receiving.receiver import KVReceiver
from kv_transfer.sending.prefixes import HeldPrefix, PrefixSender
from kv_transfer.sending.sender import KVSender
from kv_transfer.trace import trace_for

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc
    from prometheus_client import CollectorRegistry

    from cluster.config import LoadedConfig
    from cluster.member import Member
    from cluster.node import NodeId, NodeLoad, NodeRole
    from cluster.node_process import Node
    from cluster.node_service import Handler
    from cluster.request import SequenceRequest
    from cluster.session_hub import SessionHub
    from cluster.startup import StartupReport
    from engine.loop_parts import LayerHook, Observer, Scheduler
    from kv_transfer.receiving.block_source import BlockSource
    from kv_transfer.sending.sender import SenderEvents


async def run_role(
    role: NodeRole,
    new_node: Callable[[NodeParts], Node],
    loaded: LoadedConfig,
    report: StartupReport,
) -> None:
    """Serve until told to stop. Raises `ConfigError` for what keeps a node from serving."""
    trace_for(os.environ)
    engine = Engine.create(loaded[EngineConfig], progress=report)
    with report.phase("open transport"):
        agent = TransferAgent.create(engine.kv_pools, loaded[KVTransferConfig])

    def build(
        hub: SessionHub, node_id: NodeId, *, on_fatal: Callable[[BaseException], None]
    ) -> Node:
        return new_node(NodeParts(role, engine, agent, hub, node_id, on_fatal=on_fatal))

    await run_node(role, loaded[MemberConfig], report, build)


class NodeParts:
    """Build it on the event loop, then call `run_engine` and `open_sender` once. What ends the
    node is watched from here on."""

    loop: EngineLoop
    sender: KVSender
    prefixes: PrefixSender

    def __init__(
        self,
        role: NodeRole,
        engine: Engine,
        agent: TransferAgent,
        hub: SessionHub,
        node_id: NodeId,
        *,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self.engine = engine
        self.agent = agent
        self.hub = hub
        self.fetches_prefixes = agent.config.fetch_prefixes
        self.info = node_info(node_id, role, engine, fetches_prefixes=self.fetches_prefixes)
        self._compatibility = Compatibility(PROTOCOL_VERSION, self.info.compatibility_hash)
        self._on_fatal = on_fatal
        self._member: Member
        engine.watch(on_fatal)
        agent.quarantine.watch(on_fatal)

    def run_engine(
        self,
        scheduler: Scheduler,
        observer: Observer,
        layer_hook: LayerHook | None = None,
    ) -> None:
        """Makes the loop; `start` starts it."""
        self.loop = EngineLoop(
            self.engine,
            scheduler,
            observer,
            on_fatal=self._on_fatal,
            layer_hook=layer_hook,
            start_copies=self.engine.start_copies,
            rehearse=self.engine.rehearse,
        )

    def open_sender(self, others: SenderEvents | None = None) -> None:
        """`others` hears of the hand-offs that are no prefixes."""
        self.prefixes = PrefixSender(self._hold_prefix, self.info.block_size, others)
        self.sender = KVSender(
            node_id=self.info.id,
            compatibility=self._compatibility,
            agent=self.agent,
            block_size=self.info.block_size,
            events=self.prefixes,
            open_channel=partial(
                open_channel, max_message_bytes=message_limit(self.info.max_model_len)
            ),
        )
        self.prefixes.bind(self.sender)

    @property
    def num_to_send(self) -> int:
        """Hand-offs whose blocks will come back, and prefixes that are about to be one."""
        return self.prefixes.num_asked + self.sender.num_transfers

    def new_receiver(
        self,
        source: BlockSource,
        *,
        agent: TransferAgent | None = None,
        is_decoding: Callable[[], bool] | None = None,
        rehearse_start: Callable[[], None] = lambda: None,
    ) -> KVReceiver:
        """Takes KV into blocks of `source`. `agent`: one with fewer slots than the node's own.
        `is_decoding`, `rehearse_start`: as `KVReceiver` has them."""
        return KVReceiver(
            node_id=self.info.id,
            compatibility=self._compatibility,
            agent=agent or self.agent,
            source=source,
            is_decoding=is_decoding,
            rehearse_start=rehearse_start,
        )

    def sources(
        self,
        *,
        load: Callable[[], NodeLoad],
        is_idle: Callable[[], bool],
        on_replaced: Callable[[], None],
    ) -> MemberSources:
        """What its membership tells the cluster."""
        return MemberSources(
            load=load,
            transports=lambda: self.agent.transports_in_use,
            cache_changes=cache_changes(self.loop, self.engine.block_manager),
            is_idle=is_idle,
            on_replaced=on_replaced,
            seconds_without_progress=lambda: self.loop.seconds_without_progress,
        )

    def add_services(
        self, server: grpc.aio.Server, member: Member, handler: Handler, receiver: KVReceiver | None
    ) -> None:
        self._member = member
        prefixes = self.prefixes if self.fetches_prefixes else None
        service = NodeService(handler, self.hub, member, prefixes)
        node_pb2_grpc.add_NodeServicer_to_server(service, server)
        if receiver is not None:
            receiving = KvReceiverService(receiver, message_limit(self.info.max_model_len))
            node_pb2_grpc.add_KvReceiverServicer_to_server(receiving, server)

    def add_metrics(self, registry: CollectorRegistry, sources: MemberSources) -> None:
        for collector in engine_collectors(self.engine, sources.load, self.loop.stats):
            registry.register(collector)
        registry.register(
            TransferCollector(self.agent.stats, transports=sources.transports, agent=self.agent)
        )

    async def close(self) -> None:
        """When both ends of its hand-offs are closed."""
        self.loop.stop()
        await self.agent.close()
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
        return HeldPrefix(hold.block_ids, lambda: unawaited(self.loop.call(hold.release)))
