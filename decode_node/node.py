"""One decode node, put together: engine, scheduler, receiver, services, membership."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.codec import PROTOCOL_VERSION
from cluster.member import Member, MemberSources
from cluster.member_config import MemberConfig
from cluster.metrics import new_registry
from cluster.node import NodeRole, new_incarnation
from cluster.node_process import NodeProcess
from cluster.node_service import NodeService
from cluster.node_stores import NodeStores
from cluster.proto import node_pb2_grpc
from cluster.rpc import SessionHub
from cluster.version import VERSION
from decode_node.kv_session import KvReceiverService
from decode_node.loop import DecodeObserver
from decode_node.receiver import KVReceiver
from decode_node.reservations import Reservations
from decode_node.scheduler import DecodeScheduler
from decode_node.service import DecodeHandler
from engine.cache_report import cache_changes
from engine.config import EngineConfig
from engine.engine import Engine
from engine.facts import node_info
from engine.load import LoadSnapshot
from engine.loop import EngineLoop
from engine.metrics import EngineCollector
from kv_transfer.agent import TransferAgent
from kv_transfer.config import KVTransferConfig
from kv_transfer.handshake import Compatibility
from kv_transfer.metrics import TransferCollector

if TYPE_CHECKING:
    from cluster.config import LoadedConfig
    from cluster.node import NodeLoad
    from cluster.startup import StartupReport


async def run_decode_node(loaded: LoadedConfig, report: StartupReport) -> None:
    """Serve until told to stop. Raises `ConfigError` for what keeps it from serving."""
    config = loaded[MemberConfig]
    engine = Engine.create(loaded[EngineConfig], progress=report)
    with report.phase("open transport"):
        agent = TransferAgent.create(engine.kv_cache.as_bytes(), loaded[KVTransferConfig])
    registry = new_registry(role=NodeRole.DECODE.value, version=VERSION)
    stores = NodeStores(config.redis_url, registry)
    hub = SessionHub()
    process = NodeProcess(config, hub, registry)
    scheduler = DecodeScheduler(
        engine.block_manager, engine.max_num_batched_tokens, engine.max_num_seqs
    )
    reservations = Reservations(engine.block_manager, num_running=lambda: scheduler.num_running)
    snapshot = LoadSnapshot(
        scheduler,
        engine.block_manager,
        more_waiting=lambda: (reservations.num_waiting, reservations.queued_tokens),
    )
    info = node_info(config.node_id(NodeRole.DECODE, new_incarnation()), NodeRole.DECODE, engine)
    handler = DecodeHandler(engine, scheduler, reservations, hub)
    observer = DecodeObserver(
        reservations, asyncio.get_running_loop(), snapshot, on_step=handler.on_step
    )
    loop = EngineLoop(
        engine,
        scheduler,
        observer,
        on_fatal=lambda _: process.fail("The engine failed; the node ends."),
        on_idle=snapshot.take,
    )
    receiver = KVReceiver(
        node_id=info.id,
        compatibility=Compatibility(PROTOCOL_VERSION, info.compatibility_hash),
        agent=agent,
        source=handler,
    )

    def load() -> NodeLoad:
        return replace(
            snapshot.value,
            num_transfers=receiver.num_transfers,
            num_quarantined_blocks=receiver.num_quarantined_blocks,
        )

    sources = MemberSources(
        load=load,
        transports=lambda: agent.transports_in_use,
        cache_changes=cache_changes(loop, engine.block_manager),
        is_idle=lambda: handler.num_streams == 0 and receiver.num_transfers == 0,
        on_replaced=lambda: process.fail("Another node has taken this node's name."),
    )
    member = Member(info, stores.registry, stores.index, sources)
    handler.bind(loop, receiver, member)
    registry.register(EngineCollector(load, loop.stats))
    registry.register(TransferCollector(agent.stats, policy="fail", transports=sources.transports))
    node_pb2_grpc.add_NodeServicer_to_server(NodeService(handler, hub), process.server)
    node_pb2_grpc.add_KvReceiverServicer_to_server(KvReceiverService(receiver), process.server)
    loop.start()
    await receiver.start()

    async def close() -> None:
        await receiver.close()
        loop.stop()
        await agent.close()
        await stores.close()

    await process.run(member, report, close=close)
