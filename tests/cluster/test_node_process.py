"""A node's process: what ends it, in which order its parts end, and what it says of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import pytest

from cluster.errors import ConfigError, InternalError
from cluster.member import MemberSources
from cluster.member_config import MemberConfig
from cluster.metrics import new_registry
from cluster.node import Incarnation, NodeLoad, NodeRole
from cluster.node_process import EXIT_FAILED, NodeProcess, node_main, run_node
from cluster.options import option
from cluster.registry import decode_entry, encode_entry
from cluster.session_hub import SessionHub
from cluster.startup import PROGRESS_FD_VARIABLE, StartupReport

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from cluster.node import NodeInfo
    from cluster.startup import Fact


@pytest.fixture(autouse=True)
def last_resort(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would end the process of these tests, too."""
    asked: list[str] = []
    monkeypatch.setattr("cluster.node_process.end_within", lambda: asked.append("armed"))
    return asked


class RecordingMember:
    """Notes the order of the end. Drains at once, unless it is held."""

    def __init__(self, info: NodeInfo, log: list[str]) -> None:
        self.info = info
        self.log = log
        self.may_drain = asyncio.Event()
        self.may_drain.set()
        self.is_draining = asyncio.Event()

    def start(self, grpc_address: str, metrics_address: str) -> None:
        self.log.append("announced")
        self.addresses = (grpc_address, metrics_address)

    def cordon(self) -> None:
        self.log.append("cordoned")

    async def drained(self, timeout_seconds: float) -> bool:
        self.is_draining.set()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self.may_drain.wait()
        except TimeoutError:
            return False
        self.log.append("drained")
        return True

    async def stop(self) -> None:
        self.log.append("withdrawn")


class World:
    def __init__(self, info: NodeInfo, **options: Any) -> None:
        self.log: list[str] = []
        self.facts: list[Mapping[str, Fact]] = []
        self.ready = asyncio.Event()
        self.hub = SessionHub()
        config = MemberConfig(port=0, metrics_port=0) if not options else MemberConfig(**options)
        registry = new_registry(role="decode", version="0")
        self.process = NodeProcess(config, self.hub, registry)
        self.process.open_server(info.max_model_len)
        self.member = RecordingMember(info, self.log)

    def start(self) -> asyncio.Task[None]:
        report = StartupReport(self._on_fact)
        return asyncio.create_task(
            self.process.run(cast("Any", self.member), report, close=self._close)
        )

    def _on_fact(self, fact: Mapping[str, Fact]) -> None:
        self.facts.append(fact)
        self.ready.set()

    async def _close(self) -> None:
        self.log.append("closed")


@pytest.fixture
def run(
    make_node: Callable[..., NodeInfo],
) -> Iterator[Callable[..., None]]:
    def runner(body: Callable[[World], Awaitable[None]], **options: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(20):
                await body(World(make_node(), **options))

        asyncio.run(bounded())

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield runner
    for number, handler in handlers.items():
        signal.signal(number, handler)


class RecordingNode:
    """The parts that a role would build."""

    def __init__(self, info: NodeInfo, log: list[str]) -> None:
        self.info = info
        self.log = log

    def sources(self, on_replaced: Callable[[], None]) -> MemberSources:
        async def no_changes(everything: bool) -> tuple[tuple[()], tuple[()]]:
            return (), ()

        return MemberSources(
            load=NodeLoad,
            transports=tuple,
            cache_changes=no_changes,
            is_idle=lambda: True,
            on_replaced=on_replaced,
        )

    def add_services(self, server: Any, member: Any) -> None:
        self.log.append(f"services of {member.info.id.name}")

    def add_metrics(self, registry: Any, sources: MemberSources) -> None:
        self.log.append("metrics")

    async def start(self, member: Any) -> None:
        self.log.append("started")

    async def close(self) -> None:
        self.log.append("closed")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("the engine is gone"), "The engine failed. The node ends."),
        (
            InternalError("Too much KV memory is lost."),
            "Too much KV memory is lost. The node ends.",
        ),
    ],
)
def test_a_node_is_built_served_and_ended_by_its_engine(
    make_node: Callable[..., NodeInfo], redis_url: str, error: Exception, said: str
) -> None:
    log: list[str] = []
    config = MemberConfig(port=0, metrics_port=0, node_name="n-1", redis_url=redis_url)

    async def body() -> None:
        fatal: list[Callable[[BaseException], None]] = []

        def build(hub: SessionHub, node_id: Any, *, on_fatal: Any) -> RecordingNode:
            fatal.append(on_fatal)
            return RecordingNode(replace(make_node(), id=node_id), log)

        def on_fact(fact: Mapping[str, Fact]) -> None:
            if fact["event"] == "ready":
                fatal[0](error)

        async with asyncio.timeout(20):
            await run_node(NodeRole.DECODE, config, StartupReport(on_fact), build)

    with pytest.raises(InternalError, match=said):
        asyncio.run(body())
    assert log == ["services of n-1", "metrics", "started", "closed"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_withdraws_and_closes_in_this_order(run: Any, number: int) -> None:
    async def body(world: World) -> None:
        running = world.start()
        await world.ready.wait()
        assert world.facts[-1]["event"] == "ready"
        assert world.facts[-1]["grpc"] == world.member.addresses[0]
        await asyncio.sleep(0)
        os.kill(os.getpid(), number)
        await running
        assert world.log == ["announced", "drained", "withdrawn", "closed"]

    run(body)


def test_streams_still_open_at_the_end_of_the_timeout_are_ended(run: Any) -> None:
    async def body(world: World) -> None:
        world.member.may_drain.clear()
        running = world.start()
        await world.ready.wait()
        session = world.hub.open("g")
        await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGTERM)
        await running
        assert session.is_closed
        assert world.log == ["announced", "withdrawn", "closed"]

    run(body, port=0, metrics_port=0, shutdown_timeout=0.01)


def test_a_fatal_error_ends_the_process_without_waiting_for_requests(run: Any) -> None:
    async def body(world: World) -> None:
        world.member.may_drain.clear()
        running = world.start()
        await world.ready.wait()
        session = world.hub.open("g")
        world.process.fail("The engine failed.")
        with pytest.raises(InternalError, match="engine failed"):
            await running
        assert world.log == ["announced", "cordoned", "withdrawn", "closed"]
        assert not world.member.is_draining.is_set(), "gateways would take the loss for in order"
        assert not session.is_closed, "it breaks, as that of a node that has not left in order"

    run(body)


def test_a_fatal_error_while_draining_ends_the_wait(run: Any) -> None:
    async def body(world: World) -> None:
        world.member.may_drain.clear()
        running = world.start()
        await world.ready.wait()
        await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGTERM)
        await world.member.is_draining.wait()
        world.process.fail("The engine failed.")
        with pytest.raises(InternalError):
            await running
        assert "drained" not in world.log

    run(body)


def test_a_port_that_is_taken_closes_what_was_opened_and_announces_nothing(run: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()

        async def body(world: World) -> None:
            with pytest.raises(ConfigError, match="in use"):
                await world.start()
            assert world.log == ["closed"]

        run(body, port=taken.getsockname()[1], metrics_port=0)


@pytest.mark.parametrize(("advertised", "is_told"), [("", True), ("127.0.0.1", False)])
def test_a_node_that_tells_others_the_address_of_every_machine_says_so(
    run: Any, caplog: pytest.LogCaptureFixture, advertised: str, is_told: bool
) -> None:
    async def body(world: World) -> None:
        running = world.start()
        await world.ready.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await running

    run(body, host="0.0.0.0", port=0, metrics_port=0, advertise_host=advertised)
    assert ("--advertise-host" in caplog.text) == is_told


# ---- the program around it ----------------------------------------------------------------


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What the program tells its supervisor."""
    reader, writer = os.pipe()
    monkeypatch.setenv(PROGRESS_FD_VARIABLE, str(writer))
    os.set_blocking(reader, False)
    with os.fdopen(reader, "rb", buffering=0) as stream:
        yield lambda: [json.loads(line) for line in (stream.read() or b"").splitlines()]
    os.close(writer)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSection:
    """What a node's own sections must have: a model."""

    model: str = option("", help="The model.")


def main_with(body: Callable[..., Awaitable[None]]) -> int:
    role = ModuleType("a_role")
    vars(role)["run"] = body
    with mock.patch.dict(sys.modules, {"a_role": role}):
        return node_main(NodeRole.DECODE, (ModelSection,), ["--port", "0"], "a_role:run")


def test_a_configuration_that_cannot_work_is_told_to_the_supervisor_and_raised(told: Any) -> None:
    async def body(loaded: Any, report: Any) -> None:
        raise ConfigError("There are no weights.")

    with pytest.raises(ConfigError):
        main_with(body)
    assert told()[-1] == {"event": "failed", "message": "There are no weights."}


def test_a_node_that_fails_while_it_serves_has_an_exit_code_of_its_own(told: Any) -> None:
    async def body(loaded: Any, report: Any) -> None:
        raise InternalError("The engine failed.")

    assert main_with(body) == EXIT_FAILED


def test_a_node_that_was_told_to_stop_ends_well(told: Any) -> None:
    async def body(loaded: Any, report: Any) -> None:
        assert loaded[MemberConfig].port == 0

    assert main_with(body) == 0


def test_a_node_without_a_name_is_told_from_others_in_logs_and_registry() -> None:
    by_port = MemberConfig(host="10.0.0.7", port=9101)
    assert by_port.lasting_name(NodeRole.DECODE) == "decode-10.0.0.7-9101"
    assert by_port.node_id(NodeRole.DECODE, Incarnation(1)).name == "decode-10.0.0.7-9101"
    portless = MemberConfig(port=0)
    assert portless.lasting_name(NodeRole.DECODE) is None
    names = {portless.node_id(NodeRole.DECODE, Incarnation(n)).name for n in (1, 2)}
    assert len(names) == 2, "one would end the other: a name belongs to one node"


def test_by_default_a_node_on_an_ipv6_address_is_called_and_found_as_the_registry_takes_it(
    make_node: Callable[..., NodeInfo],
) -> None:
    config = MemberConfig(host="fe80::1", port=9101)
    address = config.address(9101)
    assert address == "[fe80::1]:9101"
    node_id = config.node_id(NodeRole.DECODE, Incarnation(1))
    entry = encode_entry(replace(make_node(), id=node_id, grpc_address=address))
    assert decode_entry(entry).id == node_id
    assert MemberConfig(host="10.0.0.7").address(9101) == "10.0.0.7:9101"


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("node_name", {"node_name": "a b"}),
        ("node_name", {"node_name": "-a"}),
        ("node_name", {"node_name": "a" * 65}),
        ("node_name", {"advertise_host": "a" * 60}),
        ("host", {"host": "a b"}),
        ("advertise_host", {"advertise_host": "http://a/"}),
    ],
)
def test_a_node_that_the_registry_would_refuse_does_not_start(
    param: str, options: dict[str, Any]
) -> None:
    """It would serve, and nobody know of it."""
    with pytest.raises(ConfigError) as raised:
        MemberConfig(**options)
    assert raised.value.param == param


def test_what_hangs_while_a_node_ends_does_not_keep_it(run: Any, last_resort: list[str]) -> None:
    async def body(world: World) -> None:
        async def close() -> None:
            world.log.append(f"closing, {last_resort}")

        world._close = close  # type: ignore[method-assign]
        running = world.start()
        await world.ready.wait()
        assert last_resort == []
        world.process.fail("Too much KV memory is lost.")
        with pytest.raises(InternalError):
            await running
        assert world.log[-2:] == ["withdrawn", "closing, ['armed']"]

    run(body)


def test_a_process_ends_whatever_its_threads_wait_for() -> None:
    """Python itself would wait for the thread."""
    program = """
import threading
from cluster.last_resort import end_within
threading.Thread(target=threading.Event().wait, name="stuck").start()
end_within(0.2)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], timeout=60, stderr=subprocess.PIPE, check=False
    )
    assert ended.returncode == EXIT_FAILED
    assert b"Timeout" in ended.stderr
