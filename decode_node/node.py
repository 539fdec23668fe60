"""One decode node, put together: engine, scheduler, receiver, services, membership."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.clock import monotonic
from cluster.node import NodeRole
from cluster.proto import node_pb2_grpc
from cluster.rpc import open_channel
from decode_node.loop import DecodeObserver
from decode_node.measured_source import MeasuredSource
from decode_node.measuring import HandoffMeasuring
from decode_node.recompute import RecomputeBudget
from decode_node.reservations import Reservations
from decode_node.scheduler import DecodeScheduler
from decode_node.service import DecodeHandler
from engine.load import LoadSnapshot
from node_parts.wiring import NodeParts, run_role

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc
    from prometheus_client import CollectorRegistry

    from cluster.config import LoadedConfig
    from cluster.member import Member, MemberSources
    from cluster.node import NodeLoad
    from cluster.startup import StartupReport
    from kv_transfer.config import KVTransferConfig


class DecodeNode:
    """Prompts come in over hand-offs and run here. Build it on the event loop."""

    def __init__(self, parts: NodeParts) -> None:
        self.parts = parts
        self.info = parts.info
        engine = parts.engine
        manager = engine.block_manager
        scheduler = DecodeScheduler(
            manager,
            engine.max_num_batched_tokens,
            engine.max_num_seqs,
            max_model_len=engine.max_model_len,
            first_handoff=lambda: reservations.first_place,
        )
        reservations = Reservations(manager, scheduler)
        self._snapshot = LoadSnapshot(
            scheduler,
            manager,
            more_waiting=lambda: (reservations.num_waiting, reservations.queued_tokens),
        )
        budget = _recompute_budget(parts.agent.config)
        self.handler = DecodeHandler(engine, scheduler, reservations, parts.hub, budget)
        observer = DecodeObserver(
            reservations,
            asyncio.get_running_loop(),
            self._snapshot,
            on_step=self.handler.on_step,
        )
        parts.run_engine(scheduler, observer)
        parts.open_sender()
        source = MeasuredSource(manager, self.handler, parts.loop, monotonic)
        self._receiver = parts.new_receiver(
            source, is_decoding=lambda: parts.loop.is_busy, rehearse_start=parts.loop.rehearse
        )
        self._measuring = HandoffMeasuring(
            source,
            self._receiver,
            block_size=manager.block_size,
            is_idle=lambda: self.handler.num_streams == 0,
            open_channel=open_channel,
        )

    def sources(self, on_replaced: Callable[[], None]) -> MemberSources:
        """What its membership tells the cluster."""
        return self.parts.sources(load=self._load, is_idle=self._is_idle, on_replaced=on_replaced)

    def add_services(self, server: grpc.aio.Server, member: Member) -> None:
        self.parts.add_services(server, member, self.handler, self._receiver)
        node_pb2_grpc.add_MeasuringServicer_to_server(self._measuring, server)  # type: ignore[no-untyped-call]

    def add_metrics(self, registry: CollectorRegistry, sources: MemberSources) -> None:
        self.parts.add_metrics(registry, sources)

    async def start(self, member: Member) -> None:
        self.handler.bind(self.parts.loop, self._receiver, member)
        self._measuring.bind(member)
        self.parts.loop.start()
        await self._receiver.start()
        await self.parts.sender.start()

    async def close(self) -> None:
        await self.parts.sender.close()
        await self._receiver.close()
        await self.parts.close()

    def _is_idle(self) -> bool:
        num_transfers = self._receiver.num_transfers + self.parts.num_to_send
        return self.handler.num_streams == 0 and num_transfers == 0

    def _load(self) -> NodeLoad:
        return replace(
            self._snapshot.value,
            num_transfers=self._receiver.num_transfers,
            num_quarantined_blocks=self._receiver.num_quarantined_blocks,
        )


def _recompute_budget(config: KVTransferConfig) -> RecomputeBudget:
    return RecomputeBudget(
        max_concurrent=config.max_recomputes,
        tokens_per_second=config.recompute_tokens_per_second,
        now=monotonic(),
    )


async def run_decode_node(loaded: LoadedConfig, report: StartupReport) -> None:
    """Serve until told to stop. Raises `ConfigError` for what keeps it from serving."""
    await run_role(NodeRole.DECODE, DecodeNode, loaded, report)
