"""A gateway's process around its parts: start, serve, stop.

Life of the process
    1. The tokenizer is loaded and both ports are taken; whatever is wrong ends the start.
    2. The registry is watched; nodes are connected to as they appear. With the first pair, or
       after a grace, HTTP is served: one that was started again refuses nobody with 503 while
       it is only about to know its nodes. Without a pair it says 503.
    3. With the first pair the process reports ready.
    4. SIGTERM or SIGINT: listeners are closed. What has come until then is served as ever, and
       has `shutdown_timeout` seconds; then each request ends with one typed error. A second
       signal skips the wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import secrets
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvloop

from cluster import clock as clocks
from cluster.errors import ConfigError, NodeUnavailable
from cluster.loop_watch import LoopWatch
from cluster.membership_watcher import MembershipWatcher
from cluster.metrics import StoreMetrics, new_registry
from cluster.prefix_index import PrefixIndex
from cluster.redis_client import Store
from cluster.registry import Registry
from cluster.version import VERSION
from gateway.admin.app import admin_app
from gateway.admin.token_file import left_admin_token
from gateway.app import public_app
from gateway.assembly import assemble
from gateway.chat_template import ChatTemplate
from gateway.http_server import HttpServer
from gateway.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster.startup import StartupReport
    from gateway.config import GatewayConfig
    from gateway.gateway import Gateway

logger = logging.getLogger(__name__)
READY_POLL_SECONDS = 0.05
FIRST_PAIR_SECONDS = 2.0
FIRST_WORDS_SECONDS = 8.0
STILL_WAITING_SECONDS = 30.0
LAST_WORDS_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What there is to know of a gateway that serves."""

    url: str
    admin_url: str
    model: str


@dataclass(slots=True)
class Parts:
    """What a gateway's process owns. The public server is the first."""

    gateway: Gateway
    watcher: MembershipWatcher
    servers: list[HttpServer]
    drawn_token: str | None  # of the admin API, if none was given
    stores: list[Store]


def serve(config: GatewayConfig, report: StartupReport) -> None:
    """The whole life of the process. Raises `ConfigError` when it cannot start."""
    uvloop.run(run(config, report))


async def run(
    config: GatewayConfig,
    report: StartupReport,
    on_ready: Callable[[Ready], None] | None = None,
) -> None:
    """Serve until told to stop. Raises `ConfigError` when it cannot start."""
    stop = asyncio.Event()
    hurry = asyncio.Event()
    _install_signals(stop, hurry)
    with report.phase("load tokenizer"):
        tokenizer = Tokenizer.from_folder(config.model)
        template = ChatTemplate.from_folder(config.model, tokenizer.special_tokens)
    parts = build(config, tokenizer, template)
    stack = contextlib.ExitStack()
    background = [
        asyncio.create_task(parts.watcher.run(), name="membership"),
        asyncio.create_task(parts.gateway.dispatcher.sweep(), name="sweep"),
    ]
    try:
        public, admin = parts.servers
        admin.start()
        stack.enter_context(drawn_token_told(parts.drawn_token, admin.host, admin.port))
        with report.phase("wait for nodes") as phase:
            await _first_pair(parts.gateway, stop)
            public.start()
            await _wait_for_nodes(parts.gateway, stop)
            phase.is_given_up = stop.is_set()
        if not stop.is_set():
            _announce(parts, report, on_ready)
        await _first_done(stop, background)
        await shut_down(parts.gateway, parts.servers, hurry)
    finally:
        stack.close()
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await parts.gateway.nodes.close()
        for store in parts.stores:
            await store.close()
        tokenizer.close()


def build(config: GatewayConfig, tokenizer: Tokenizer, template: ChatTemplate | None) -> Parts:
    """Wire everything and take both ports; nothing runs yet."""
    registry = new_registry(role="gateway", version=VERSION)
    registry.register(LoopWatch())
    store_metrics = StoreMetrics(registry)
    nodes_store = Store(config.redis_url, name="registry", metrics=store_metrics)
    index_store = Store(config.redis_url, name="prefix_index", metrics=store_metrics)
    gateway = assemble(
        config,
        tokenizer=tokenizer,
        template=template,
        index=PrefixIndex(index_store),
        observe=lambda event: watcher.observe(event),
        registry=registry,
        clock=clocks.monotonic,
    )
    watcher = MembershipWatcher(
        Registry(nodes_store),
        on_change=gateway.nodes.apply,
        on_gone=lambda node, _: gateway.nodes.retire(node),
    )
    drawn = None if config.admin_token else secrets.token_urlsafe(24)
    token = config.admin_token or drawn or ""
    admin = admin_app(gateway, token=token, host=config.admin_host, observe=watcher.observe)
    servers = [
        HttpServer(public_app(gateway, registry), config.host, config.port, param="port"),
        HttpServer(admin, config.admin_host, config.admin_port, param="admin_port"),
    ]
    return Parts(gateway, watcher, servers, drawn, [nodes_store, index_store])


def _announce(
    parts: Parts, report: StartupReport, on_ready: Callable[[Ready], None] | None
) -> None:
    gc.collect()
    gc.freeze()  # what lives now lives on: later collections need not look at it
    public, admin = parts.servers
    facts = Ready(url=public.url, admin_url=admin.url, model=parts.gateway.model_names[0])
    report.ready(url=facts.url, admin_url=facts.admin_url, model=facts.model)
    if on_ready is not None:
        on_ready(facts)


async def shut_down(gateway: Gateway, servers: list[HttpServer], hurry: asyncio.Event) -> None:
    """In this order: close listeners, let requests finish, take no more, end the rest with an
    error."""
    for server in servers:
        server.stop()
    waiting = asyncio.create_task(_wait_all(servers))
    hurrying = asyncio.create_task(hurry.wait())
    timeout = gateway.config.shutdown_timeout
    await asyncio.wait({waiting, hurrying}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    hurrying.cancel()
    gateway.admission.close()
    if not waiting.done():
        num_cut = len(gateway.dispatcher.active)
        if num_cut:
            why = "told again to stop" if hurry.is_set() else f"{timeout:.0f} s after that"
            logger.warning("told to stop; %s, %d sequences that still run are cut", why, num_cut)
        gateway.dispatcher.fail_all(
            NodeUnavailable(
                "This gateway is shutting down.", reason="shutting_down", retry_after_seconds=1.0
            )
        )
        await asyncio.wait({waiting}, timeout=LAST_WORDS_SECONDS)
        for server in servers:
            server.abort()
    await waiting


async def _wait_all(servers: list[HttpServer]) -> None:
    await asyncio.gather(*(server.wait() for server in servers))


async def _first_pair(gateway: Gateway, stop: asyncio.Event) -> None:
    """Returns with the first pair of nodes, or soon without."""
    waited = 0.0
    while waited < FIRST_PAIR_SECONDS and not gateway.is_ready and not stop.is_set():
        await asyncio.sleep(READY_POLL_SECONDS)
        waited += READY_POLL_SECONDS


async def _wait_for_nodes(gateway: Gateway, stop: asyncio.Event) -> None:
    """Returns with the first pair of nodes, or when told to stop. What is missing is said soon,
    then now and then."""
    waited = STILL_WAITING_SECONDS - FIRST_WORDS_SECONDS
    while not gateway.is_ready and not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), READY_POLL_SECONDS)
        waited += READY_POLL_SECONDS
        if waited >= STILL_WAITING_SECONDS:
            waited = 0.0
            logger.warning("no request can be served yet: %s", gateway.nodes.what_is_missing())


async def _first_done(stop: asyncio.Event, background: list[asyncio.Task[None]]) -> None:
    """Until told to stop. A background task never ends by itself: its end is raised."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({stopping, *background}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    for task in background:
        if task.done():
            task.result()


def _install_signals(stop: asyncio.Event, hurry: asyncio.Event) -> None:
    def handle() -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handle)


@contextlib.contextmanager
def drawn_token_told(token: str | None, host: str, port: int) -> Iterator[None]:
    """Inside, `baton admin` of this user finds it; else the log has it. None: one was given."""
    if token is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(left_admin_token(host, port, token))
        except ConfigError as error:
            told = "no BATON_ADMIN_TOKEN was given, and %s For this run it is %s"
            logger.warning(told, error.message, token)
        else:
            told = "no BATON_ADMIN_TOKEN was given: one is in %s, where baton admin finds it"
            logger.info(told, path)
        yield
