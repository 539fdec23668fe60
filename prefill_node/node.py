"""One prefill node, put together: engine, scheduler, sender, services, membership."""

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
from cluster.rpc import SessionHub, open_channel
from cluster.version import VERSION
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
from prefill_node.loop import PrefillObserver
from prefill_node.scheduler import PrefillScheduler
from prefill_node.sender import KVSender
from prefill_node.service import PrefillHandler

if TYPE_CHECKING:
    from cluster.config import LoadedConfig
    from cluster.node import NodeLoad
    from cluster.startup import StartupReport


async def run_prefill_node(loaded: LoadedConfig, report: StartupReport) -> None:
    """Serve until told to stop. Raises `ConfigError` for what keeps it from serving."""
    config = loaded[MemberConfig]
    engine = Engine.create(loaded[EngineConfig], progress=report)
    with report.phase("open transport"):
        agent = TransferAgent.create(engine.kv_cache.as_bytes(), loaded[KVTransferConfig])
    registry = new_registry(role=NodeRole.PREFILL.value, version=VERSION)
    stores = NodeStores(config.redis_url, registry)
    hub = SessionHub()
    process = NodeProcess(config, hub, registry)
    scheduler = PrefillScheduler(
        engine.block_manager, engine.max_num_batched_tokens, engine.max_num_seqs
    )
    snapshot = LoadSnapshot(scheduler, engine.block_manager)
    info = node_info(config.node_id(NodeRole.PREFILL, new_incarnation()), NodeRole.PREFILL, engine)
    handler = PrefillHandler(engine, scheduler, hub)
    observer = PrefillObserver(
        engine.block_manager,
        asyncio.get_running_loop(),
        snapshot,
        on_scheduled=handler.on_scheduled,
        on_step=handler.on_step,
    )
    loop = EngineLoop(
        engine,
        scheduler,
        observer,
        on_fatal=lambda _: process.fail("The engine failed; the node ends."),
        on_idle=snapshot.take,
    )
    sender = KVSender(
        node_id=info.id,
        compatibility=Compatibility(PROTOCOL_VERSION, info.compatibility_hash),
        agent=agent,
        block_size=info.block_size,
        events=handler,
        open_channel=open_channel,
    )

    def load() -> NodeLoad:
        return replace(snapshot.value, num_transfers=sender.num_transfers)

    sources = MemberSources(
        load=load,
        transports=lambda: agent.transports_in_use,
        cache_changes=cache_changes(loop, engine.block_manager),
        is_idle=lambda: handler.num_prompts == 0,
        on_replaced=lambda: process.fail("Another node has taken this node's name."),
    )
    member = Member(info, stores.registry, stores.index, sources)
    handler.bind(loop, observer, sender, member)
    registry.register(EngineCollector(load, loop.stats))
    registry.register(TransferCollector(agent.stats, policy="fail", transports=sources.transports))
    node_pb2_grpc.add_NodeServicer_to_server(NodeService(handler, hub), process.server)
    loop.start()
    await sender.start()

    async def close() -> None:
        await sender.close()
        loop.stop()
        await agent.close()
        await stores.close()

    await process.run(member, report, close=close)
