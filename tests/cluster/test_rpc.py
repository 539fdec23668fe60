from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest

from cluster import rpc
from cluster.codec import PROTOCOL_VERSION, decode_sequence, encode_sequence
from cluster.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InternalError,
    NodeLost,
    NodeUnavailable,
    Overloaded,
    ServingError,
)
from cluster.proto import node_pb2 as pb
from cluster.proto import node_pb2_grpc
from cluster.request import SamplingParams, SequenceRequest, TokenDelta
from cluster.session_hub import SessionHub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class SmallNode(node_pb2_grpc.NodeServicer):
    """A node without an engine: fails as told, and serves sessions through a hub."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.hub = SessionHub(max_pending_bytes=2 * 2**20)
        self.received: list[pb.GatewayFrame] = []
        self.ended = asyncio.Event()
        self.opened = asyncio.Event()

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.NodeDescription:
        if self.error is not None:
            raise self.error
        return pb.NodeDescription(name="n")

    async def Inspect(self, request: pb.InspectRequest, context: Any) -> pb.InspectReply:
        await asyncio.Event().wait()
        return pb.InspectReply()

    async def Session(
        self, frames: AsyncIterator[pb.GatewayFrame], context: Any
    ) -> AsyncIterator[pb.NodeFrame]:
        self.received.append(await anext(frames))
        if self.error is not None:
            raise self.error
        session = self.hub.open("g")
        self.opened.set()
        try:
            async for frame in session:
                yield frame
        finally:
            self.hub.close(session)
            self.ended.set()


@asynccontextmanager
async def served(node: SmallNode) -> AsyncIterator[node_pb2_grpc.NodeStub]:
    server = rpc.create_server()
    node_pb2_grpc.add_NodeServicer_to_server(node, server)  # type: ignore[no-untyped-call]
    port = rpc.bind(server, "127.0.0.1", 0)
    await server.start()
    try:
        async with rpc.open_channel(f"127.0.0.1:{port}") as channel:
            yield node_pb2_grpc.NodeStub(channel)  # type: ignore[no-untyped-call]
    finally:
        await server.stop(0)


async def describe(node: SmallNode) -> ServingError:
    async with served(node) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Describe(pb.DescribeRequest())
    return rpc.error_from_rpc(raised.value)


def test_a_handlers_error_arrives_as_the_same_class_with_all_it_says() -> None:
    async def scenario() -> None:
        error = await describe(SmallNode(Overloaded("Büsy.", retry_after_seconds=2.5)))
        assert isinstance(error, Overloaded)
        assert (error.message, error.retry_after_seconds) == ("Büsy.", 2.5)

    asyncio.run(scenario())


def test_a_bug_in_a_handler_arrives_without_details() -> None:
    async def scenario() -> None:
        error = await describe(SmallNode(RuntimeError("/secret/path")))
        assert isinstance(error, InternalError)
        assert "secret" not in error.message

    asyncio.run(scenario())


def test_a_streams_error_arrives_as_the_same_class() -> None:
    async def scenario() -> None:
        async with served(SmallNode(Overloaded("Busy."))) as stub:
            call = stub.Session()
            await call.write(pb.GatewayFrame())
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call.read()
        assert isinstance(rpc.error_from_rpc(raised.value), Overloaded)

    asyncio.run(scenario())


def test_a_status_without_details_still_has_a_class() -> None:
    async def scenario() -> None:
        async with served(SmallNode()) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as late:
                await stub.Inspect(pb.InspectRequest(), timeout=0.05)
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await stub.Control(pb.ControlRequest())
        assert isinstance(rpc.error_from_rpc(late.value), DeadlineExceeded)
        assert isinstance(rpc.error_from_rpc(unknown.value), InternalError)
        async with rpc.open_channel("127.0.0.1:1") as channel:
            stub = node_pb2_grpc.NodeStub(channel)  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.aio.AioRpcError) as unreachable:
                await stub.Describe(pb.DescribeRequest())
        assert isinstance(rpc.error_from_rpc(unreachable.value), NodeLost)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (grpc.StatusCode.CANCELLED, Cancelled),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded),
        (grpc.StatusCode.UNAVAILABLE, NodeLost),
        (grpc.StatusCode.DATA_LOSS, InternalError),
    ],
)
def test_forged_details_are_not_believed(status: grpc.StatusCode, kind: type) -> None:
    forged = grpc.aio.Metadata(("baton-error-bin", b"\xff\xff\xff"))
    error = grpc.aio.AioRpcError(status, grpc.aio.Metadata(), forged)
    assert type(rpc.error_from_rpc(error)) is kind


def test_a_prompt_of_a_million_tokens_fits_a_message() -> None:
    request = SequenceRequest(
        sequence_id="s",
        request_id="r",
        prompt_token_ids=tuple(range(100_000, 1_100_000)),
        sampling=SamplingParams(max_tokens=1, seed=1),
    )

    async def scenario() -> None:
        node = SmallNode()
        async with served(node) as stub:
            call = stub.Session()
            submit = pb.Submit(sequence=encode_sequence(request))
            await call.write(pb.GatewayFrame(submit=submit))
            await node.opened.wait()
            assert decode_sequence(node.received[0].submit.sequence) == request
            call.cancel()

    asyncio.run(scenario())


def test_a_gateway_that_stops_reading_ends_on_the_node() -> None:
    """The stream hangs in a write; dropping the session must still reach the clean-up. A gateway
    that reads again hears of it: it would wait for tokens that nobody computes any more."""

    async def scenario() -> None:
        node = SmallNode()
        async with served(node) as stub:
            call = stub.Session()
            hello = pb.GatewayHello(gateway_id="g", protocol_version=PROTOCOL_VERSION)
            await call.write(pb.GatewayFrame(hello=hello))
            await node.opened.wait()
            delta = TokenDelta(sequence_id="s", token_ids=tuple(range(10_000)))
            while not node.ended.is_set():
                node.hub.publish("g", [delta])
                await asyncio.sleep(0)
            assert not node.hub.is_open("g")
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await _read_all(call)
        told = rpc.error_from_rpc(raised.value)
        assert isinstance(told, NodeUnavailable)
        assert told.reason == "dropped"

    asyncio.run(scenario())


def test_a_gateway_that_leaves_ends_on_the_node() -> None:
    async def scenario() -> None:
        node = SmallNode()
        async with served(node) as stub:
            call = stub.Session()
            await call.write(pb.GatewayFrame())
            await node.opened.wait()
            call.cancel()
            await node.ended.wait()

    asyncio.run(scenario())


def test_a_taken_port_is_a_config_error() -> None:
    async def scenario() -> None:
        first, second = rpc.create_server(), rpc.create_server()
        port = rpc.bind(first, "127.0.0.1", 0)
        await first.start()
        with pytest.raises(ConfigError, match="in use") as raised:
            rpc.bind(second, "127.0.0.1", port)
        assert raised.value.param == "port"
        with pytest.raises(ConfigError, match=r"on none\.invalid:0: (?!is it in use)"):
            rpc.bind(second, "none.invalid", 0)
        await first.stop(0)

    asyncio.run(scenario())


def test_a_peer_that_is_slow_to_greet_is_not_taken_for_lost() -> None:
    """As one on a busy machine, twice as long as until the next attempt to connect."""

    async def scenario() -> None:
        writers: list[asyncio.StreamWriter] = []

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(0.4)
            onward = await asyncio.open_connection("127.0.0.1", port)
            writers.extend((writer, onward[1]))
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(_pump(reader, onward[1]))
                pumps.create_task(_pump(onward[0], writer))

        server = rpc.create_server()
        node_pb2_grpc.add_NodeServicer_to_server(SmallNode(), server)  # type: ignore[no-untyped-call]
        port = rpc.bind(server, "127.0.0.1", 0)
        await server.start()
        slow = await asyncio.start_server(relay, "127.0.0.1", 0)
        slow_port = slow.sockets[0].getsockname()[1]
        async with rpc.open_channel(f"127.0.0.1:{slow_port}") as channel:
            stub = node_pb2_grpc.NodeStub(channel)  # type: ignore[no-untyped-call]
            assert (await stub.Describe(pb.DescribeRequest())).name == "n"
        await server.stop(None)
        for writer in writers:
            writer.close()
        slow.close()

    asyncio.run(scenario())


async def _read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
