"""A node's process around its role: ports, membership, signals, and the order of its end.

Life of a node's process
    1. `node_main` reads the options and loads the role; the role builds its engine and gives
       `run_node` a way to build the rest. Nothing listens yet.
    2. `NodeProcess.start` binds gRPC and metrics, announces the node, and reports ready.
    3. `run_until_stopped` waits for SIGTERM or SIGINT, for a fatal error, or for the name to
       be taken by another incarnation.
    4. The end, in this order: take no new work, let what runs finish within the shutdown
       timeout, withdraw from the registry, end the streams, close the role's parts, exit. After a
       fatal error nothing is waited for, and nobody hears of a drain: what runs here is lost. What
       hangs from the withdrawal on is cut short (`last_resort.py`): a node may end because
       something on its device does not.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Protocol

import uvloop

from cluster.config import LoadedConfig, load_config, render_config
from cluster.errors import ConfigError, InternalError, ServingError
from cluster.failpoints import arm as arm_failpoints
from cluster.last_resort import end_within
from cluster.logging import setup_logging
from cluster.loop_watch import LoopWatch
from cluster.member import Member
from cluster.member_config import MemberConfig
from cluster.message_size import message_limit
from cluster.metrics import MetricsServer, new_registry, start_metrics_server
from cluster.node import new_incarnation
from cluster.node_stores import NodeStores
from cluster.rpc import bind, create_server
from cluster.session_hub import SessionHub
from cluster.startup import StartupReport
from cluster.version import VERSION

if TYPE_CHECKING:
    import grpc
    from prometheus_client import CollectorRegistry

    from cluster.config import ChoosePresets
    from cluster.member import MemberSources
    from cluster.node import NodeId, NodeInfo, NodeRole

logger = logging.getLogger(__name__)
CLOSE_GRACE_SECONDS = 1.0
EXIT_FAILED = 1


class NodeProcess:
    """Runs one node. `open_server` makes the server that a role adds its services to, before
    `start`."""

    server: grpc.aio.Server

    def __init__(self, config: MemberConfig, hub: SessionHub, registry: CollectorRegistry) -> None:
        self._config = config
        self._hub = hub
        self._registry = registry
        self._stop = asyncio.Event()
        self._failed = asyncio.Event()
        self._failure: ConfigError | InternalError | None = None
        self._metrics: MetricsServer | None = None
        self._event_loop = asyncio.get_running_loop()
        registry.register(LoopWatch())

    def open_server(self, max_model_len: int) -> grpc.aio.Server:
        """It takes the longest prompt of this node."""
        self.server = create_server(message_limit(max_model_len))
        return self.server

    async def run(
        self, member: Member, report: StartupReport, *, close: Callable[[], Awaitable[None]]
    ) -> None:
        """Serve until told to stop, then `close` the role's parts. Raises `ConfigError` when a
        port is taken, `InternalError` after a fatal end."""
        try:
            await self.start(member, report)
        except ConfigError:
            end_within()
            await close()
            self._close_metrics()
            raise
        await self.run_until_stopped(member, close=close)

    async def start(self, member: Member, report: StartupReport) -> None:
        """Serve and announce. Raises `ConfigError` when a port is taken."""
        config = self._config
        port = bind(self.server, config.host, config.port)
        self._metrics = start_metrics_server(self._registry, config.host, config.metrics_port)
        await self.server.start()
        address, metrics_address = config.address(port), config.address(self._metrics.port)
        member.start(address, metrics_address)
        gc.collect()
        gc.freeze()  # a later collection that looked at it all would hold up a step for 100 ms
        atexit.register(gc.unfreeze)  # libraries count what is left at the end as leaks
        report.ready(name=str(member.info.id.name), grpc=address, metrics=metrics_address)
        if config.is_nowhere_else:
            logger.warning(
                "others are told to reach this node at %s, where every machine finds itself; "
                "--advertise-host says at which address or name they find this one",
                address,
            )

    def fail(self, message: str) -> None:
        """End the process with this message; may be called from any thread."""
        self._event_loop.call_soon_threadsafe(self._fail, message)

    async def run_until_stopped(
        self, member: Member, *, close: Callable[[], Awaitable[None]]
    ) -> None:
        """Returns after an orderly end; raises `InternalError` after a fatal one."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._event_loop.add_signal_handler(number, self._stop.set)
        await self._stop.wait()
        await self._drain(member)
        end_within()
        await member.stop()
        if self._failure is None:
            self._hub.close_all()
        # Streams that just break say that what ran here was lost.
        await self.server.stop(CLOSE_GRACE_SECONDS if self._failure is None else None)
        await close()
        self._close_metrics()
        if self._failure is not None:
            raise self._failure

    async def _drain(self, member: Member) -> None:
        """Let what runs finish, within the shutdown timeout; not after a fatal error, when what
        runs here is lost and must not be told of as leaving in order."""
        if self._failed.is_set():
            member.cordon()
            return
        draining = asyncio.create_task(member.drained(self._config.shutdown_timeout))
        failing = asyncio.create_task(self._failed.wait())
        await asyncio.wait({draining, failing}, return_when=asyncio.FIRST_COMPLETED)
        if not self._failed.is_set() and not await draining:
            logger.warning("requests still ran or were to come when the shutdown timeout ended")
        for task in (draining, failing):
            task.cancel()

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.close()

    def _fail(self, message: str) -> None:
        self._failure = self._failure or InternalError(message)
        self._failed.set()
        self._stop.set()


class Node(Protocol):
    """What a role builds around its engine."""

    @property
    def info(self) -> NodeInfo: ...
    def sources(self, on_replaced: Callable[[], None]) -> MemberSources:
        """What its membership tells the cluster."""

    def add_services(self, server: grpc.aio.Server, member: Member) -> None: ...
    def add_metrics(self, registry: CollectorRegistry, sources: MemberSources) -> None: ...
    async def start(self, member: Member) -> None: ...
    async def close(self) -> None: ...


class BuildNode(Protocol):
    def __call__(
        self, hub: SessionHub, node_id: NodeId, *, on_fatal: Callable[[BaseException], None]
    ) -> Node: ...


async def run_node(
    role: NodeRole, config: MemberConfig, report: StartupReport, build: BuildNode
) -> None:
    """Build the node and serve until told to stop. Raises `ConfigError` for what keeps it from
    serving, `InternalError` after a fatal end."""
    registry = new_registry(role=role.value, version=VERSION)
    stores = NodeStores(config.redis_url, registry)
    hub = SessionHub()
    process = NodeProcess(config, hub, registry)
    node = build(
        hub,
        config.node_id(role, new_incarnation()),
        on_fatal=lambda error: process.fail(_last_words(error)),
    )
    sources = node.sources(
        on_replaced=lambda: process.fail("Another node has taken this node's name.")
    )
    member = Member(node.info, stores.registry, stores.index, sources, hub)
    node.add_services(process.open_server(node.info.max_model_len), member)
    node.add_metrics(registry, sources)
    await node.start(member)

    async def close() -> None:
        await node.close()
        await stores.close()

    await process.run(member, report, close=close)


def _last_words(error: BaseException) -> str:
    """Errors of ours are written for who reads them; those of a device stand in the log."""
    reason = error.message if isinstance(error, ServingError) else "The engine failed."
    return f"{reason} The node ends."


NodeBody = Callable[["LoadedConfig", "StartupReport"], Awaitable[None]]


def node_main(
    role: NodeRole,
    sections: Sequence[type],
    argv: Sequence[str],
    body: str,
    *,
    presets: ChoosePresets | None = None,
) -> int:
    """The `main` of a node's program; its exit code.

    `body` names what runs the node, a `NodeBody`, as module:function. It is loaded late, so that
    help and a wrong flag need not wait for it, nor for torch.
    """
    loaded = load_config(
        f"baton {role}",
        (MemberConfig, *sections),
        argv,
        os.environ,
        positional="model",
        presets=presets,
        description=f"Run one {role} node.",
    )
    if loaded.show_config:
        print(render_config(loaded), end="")
        return 0
    arm_failpoints(os.environ)
    member = loaded[MemberConfig]
    setup_logging(
        member.log_level,
        log_format=member.log_format,
        role=role.value,
        node_id=member.lasting_name(role) or role.value,
    )
    return _run(loaded, body)


def _run(loaded: LoadedConfig, body: str) -> int:
    report = StartupReport()
    try:
        with report.phase("load programs"):
            run_body: NodeBody = resolve_name(body)
        uvloop.run(_awaited(run_body(loaded, report)))
    except ConfigError as error:
        report.failed(error.message)
        raise
    except InternalError as error:
        logger.error("%s", error.message)
        return EXIT_FAILED
    return 0


async def _awaited(running: Awaitable[None]) -> None:
    await running
