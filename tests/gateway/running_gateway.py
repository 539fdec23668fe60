"""A gateway on real sockets with fake nodes, for tests that speak HTTP to it."""

from __future__ import annotations

import asyncio
import threading
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import uvloop

from cluster import clock as clocks
from cluster.membership import Membership, ViewChanged
from cluster.membership_events import Event, Seen
from cluster.metrics import new_registry
from cluster.node import Incarnation, NodeInfo, NodeName, NodeRole
from gateway.admin.app import admin_app
from gateway.app import public_app
from gateway.assembly import assemble
from gateway.chat_template import ChatTemplate
from gateway.config import GatewayConfig
from gateway.http_server import HttpServer
from gateway.server import shut_down
from gateway.tokenizer import Tokenizer
from tests.gateway.fake_node import FakeNode
from tests.gateway.model_folder import write_model_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
    from pathlib import Path

    from cluster.prefix_hash import BlockHash

T = TypeVar("T")
ADMIN_TOKEN = "test-admin-token"
WAIT_SECONDS = 10.0


class FakeIndex:
    """`cached` is in blocks, by node; it holds for every prompt."""

    def __init__(self) -> None:
        self.cached: dict[NodeName, int] = {}
        self.num_asked = 0

    async def match(
        self, block_hashes: Sequence[BlockHash], incarnations: Mapping[NodeName, Incarnation]
    ) -> dict[NodeName, int]:
        self.num_asked += 1
        return {
            name: min(count, len(block_hashes))
            for name, count in self.cached.items()
            if name in incarnations
        }


class RunningGateway:
    """Runs in a thread of its own. `call` runs a coroutine there, `nodes` are the fake ones."""

    def __init__(
        self,
        model: Path,
        *,
        num_prefill: int = 1,
        num_decode: int = 1,
        node_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        defaults: dict[str, Any] = {
            "model": model,
            "served_model_name": ("org/test-model", "alias", "claude-*"),
            "sse_keep_alive_interval": 0.0,
        }
        self.config = GatewayConfig(**{**defaults, **options})
        self.nodes: dict[str, FakeNode] = {}
        self.index = FakeIndex()
        self.membership = Membership()
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        counts = {NodeRole.PREFILL: num_prefill, NodeRole.DECODE: num_decode}
        self.call(self._start(counts, dict(node_options or {})))

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_SECONDS)

    def do(self, function: Any, *arguments: Any) -> Any:
        """Run a plain function on the gateway's loop."""

        async def run() -> Any:
            return function(*arguments)

        return self.call(run())

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until `condition()`, asked on the gateway's loop between its events, holds."""
        self.call(_until(condition))

    @property
    def url(self) -> str:
        return self.public.url

    @property
    def decode(self) -> FakeNode:
        return self.nodes["decode-0"]

    @property
    def prefill(self) -> FakeNode:
        return self.nodes["prefill-0"]

    def close(self) -> None:
        self.call(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_SECONDS)
        self.loop.close()

    async def see(self, *infos: NodeInfo) -> None:
        """As if the registry held these entries now."""
        self._handle([Seen(info) for info in infos])

    def _handle(self, events: Sequence[Event]) -> None:
        for change in self.membership.handle_all(events, clocks.monotonic()):
            if isinstance(change, ViewChanged):
                self.gateway.nodes.apply(change.view)
            else:
                self.gateway.nodes.retire(change.node)

    def _observe(self, event: Event) -> None:
        self._handle([event])

    async def _start(self, counts: Mapping[NodeRole, int], options: dict[str, Any]) -> None:
        tokenizer = Tokenizer.from_folder(self.config.model)
        registry = new_registry(role="gateway", version="test")
        self.gateway = assemble(
            self.config,
            tokenizer=tokenizer,
            template=ChatTemplate.from_folder(self.config.model, tokenizer.special_tokens),
            index=self.index,
            observe=self._observe,
            registry=registry,
            clock=clocks.monotonic,
        )
        for role, count in counts.items():
            for number in range(count):
                node = FakeNode(role, f"{role}-{number}", peers=self.nodes, **options)
                await node.start()
        self._sweep = asyncio.create_task(self.gateway.dispatcher.sweep())
        self.public = HttpServer(public_app(self.gateway, registry), "127.0.0.1", 0, param="port")
        self.admin = HttpServer(
            admin_app(self.gateway, token=ADMIN_TOKEN, host="127.0.0.1", observe=self._observe),
            "127.0.0.1",
            0,
            param="admin_port",
        )
        self.public.start()
        self.admin.start()
        await self.see(*(node.info for node in self.nodes.values()))
        await _until(lambda: all(e.client.is_connected for e in self.gateway.nodes))

    async def stop_serving(self) -> None:
        """As after SIGTERM."""
        await shut_down(self.gateway, [self.public, self.admin], asyncio.Event())

    async def _stop(self) -> None:
        if not self.gateway.admission.is_closed:
            await shut_down(self.gateway, [self.public, self.admin], _hurry())
        self._sweep.cancel()
        await self.gateway.nodes.close()
        for node in self.nodes.values():
            await node.kill()
        self.gateway.tokenizer.close()


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():  # noqa: ASYNC110 - any condition, of any part
            await asyncio.sleep(0.001)


def _hurry() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@contextmanager
def gateway_of(
    template: str, folder: Path, *, special: Sequence[str] = ()
) -> Iterator[RunningGateway]:
    """Whose model has this chat template; `special`: tokens beside those that are always there."""
    model = write_model_folder(folder, chat_template=template, special=special)
    with closing(RunningGateway(model)) as running:
        yield running


@contextmanager
def client_of(template: str, folder: Path) -> Iterator[httpx.Client]:
    """Of a gateway whose model has this chat template."""
    with gateway_of(template, folder) as running, client_to(running) as client:
        yield client


def client_to(running: RunningGateway) -> httpx.Client:
    return httpx.Client(base_url=running.url, timeout=20)
