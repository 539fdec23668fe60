"""The face of a node over real gRPC: frames in order, garbage ends what it names, nobody else."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest

from cluster.codec import PROTOCOL_VERSION, encode_sequence
from cluster.delta_codec import decode_delta, decode_error
from cluster.errors import InvalidRequest, NodeUnavailable, ServingError
from cluster.node import NodeState
from cluster.node_service import NodeService
from cluster.proto import node_pb2 as pb
from cluster.proto import node_pb2_grpc
from cluster.request import SamplingParams, SequenceRequest, TokenDelta
from cluster.rpc import bind, create_server, error_from_rpc, open_channel
from cluster.session_hub import SessionHub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from cluster.request import Handoff


def sequence(name: str = "s") -> SequenceRequest:
    return SequenceRequest(
        sequence_id=name,
        request_id="r",
        prompt_token_ids=(1, 2, 3),
        sampling=SamplingParams(max_tokens=4, seed=0),
    )


def submit(name: str = "s") -> pb.GatewayFrame:
    return pb.GatewayFrame(submit=pb.Submit(sequence=encode_sequence(sequence(name))))


class RecordingHandler:
    """Notes what it is told, in order."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.refusal: ServingError | None = None
        self.breaks_over: tuple[str, str] | None = None
        self.changed = asyncio.Event()

    def description(self) -> pb.NodeDescription:
        return pb.NodeDescription(name="node-1", protocol_version=PROTOCOL_VERSION)

    def submit(self, gateway_id: str, sequence: SequenceRequest, handoff: Handoff | None) -> None:
        if self.refusal is not None:
            raise self.refusal
        self._note("submit", sequence.sequence_id)

    def cancel(self, sequence_id: str) -> None:
        self._note("cancel", sequence_id)

    def orphaned(self, gateway_id: str, sequence_id: str) -> None:
        self._note("orphaned", sequence_id)

    def gateway_gone(self, gateway_id: str) -> None:
        self._note("gone", gateway_id)

    def reset_prefix_cache(self) -> None:
        self._note("reset", "prefix cache")

    def control(self, action: pb.ControlRequest.Action) -> str:
        if action == pb.ControlRequest.ACTION_UNSPECIFIED:
            raise InvalidRequest("No action.")
        return "draining"

    async def inspect(self) -> pb.InspectReply:
        return pb.InspectReply(sequences=[pb.SequenceInfo(sequence_id="s")])

    def _note(self, kind: str, name: str) -> None:
        if (kind, name) == self.breaks_over:
            raise RuntimeError("nobody foresaw this")
        self.log.append((kind, name))
        self.changed.set()

    async def until(self, kind: str, name: str) -> None:
        while (kind, name) not in self.log:
            self.changed.clear()
            await self.changed.wait()


class World:
    def __init__(self) -> None:
        self.handler, self.hub = RecordingHandler(), SessionHub(clock=lambda: 0.0)
        self.stub: Any = None

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[World]:
        server = create_server()
        service = NodeService(self.handler, self.hub, self.handler)
        node_pb2_grpc.add_NodeServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        port = bind(server, "127.0.0.1", 0)
        await server.start()
        async with open_channel(f"127.0.0.1:{port}") as channel:
            self.stub = node_pb2_grpc.NodeStub(channel)  # type: ignore[no-untyped-call]
            try:
                yield self
            finally:
                self.hub.close_all()
                await server.stop(0.1)

    async def session(
        self,
        gateway_id: str = "g",
        version: int = PROTOCOL_VERSION,
        *,
        hears_state: bool = False,
    ) -> Any:
        call = self.stub.Session()
        hello = pb.GatewayHello(
            gateway_id=gateway_id, protocol_version=version, hears_state=hears_state
        )
        await call.write(pb.GatewayFrame(hello=hello))
        return call

    async def welcomed(self, gateway_id: str = "g", *, hears_state: bool = False) -> Any:
        call = await self.session(gateway_id, hears_state=hears_state)
        assert (await call.read()).welcome.name == "node-1"
        return call


def run(body: Callable[[World], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20), World().serving() as world:
            await body(world)

    asyncio.run(bounded())


async def next_delta(call: Any) -> TokenDelta:
    frame = await call.read()
    (message,) = frame.step.deltas
    return decode_delta(message)


async def error_of(call: Any) -> ServingError:
    """The typed error that ends a call."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error)
    return pytest.fail("the call ended well")


def test_frames_reach_the_handler_in_order_and_tokens_come_back() -> None:
    async def body(world: World) -> None:
        call = await world.welcomed()
        await call.write(submit("a"))
        await call.write(pb.GatewayFrame(orphaned=pb.Orphaned(sequence_id="a")))
        await call.write(pb.GatewayFrame(cancel=pb.Cancel(sequence_id="a")))
        await world.handler.until("cancel", "a")
        assert [kind for kind, _ in world.handler.log] == ["submit", "orphaned", "cancel"]
        world.hub.publish("g", [TokenDelta(sequence_id="a", token_ids=(7,))])
        assert (await next_delta(call)).token_ids == (7,)

    run(body)


def test_the_end_of_a_stream_is_the_end_of_its_gateway_once() -> None:
    async def body(world: World) -> None:
        call = await world.welcomed()
        call.cancel()
        await world.handler.until("gone", "g")
        assert world.handler.log.count(("gone", "g")) == 1
        assert not world.hub.is_open("g")

    run(body)


def test_a_gateway_that_stops_writing_is_gone_too() -> None:
    async def body(world: World) -> None:
        call = await world.welcomed()
        await call.done_writing()
        await world.handler.until("gone", "g")

    run(body)


def test_a_refused_sequence_ends_and_the_session_goes_on() -> None:
    async def body(world: World) -> None:
        call = await world.welcomed()
        world.handler.refusal = NodeUnavailable("not now", reason="not_ready")
        await call.write(submit("a"))
        refused = await next_delta(call)
        assert refused.sequence_id == "a"
        assert isinstance(refused.error, NodeUnavailable)
        assert world.hub.log.facts("a")["request_id"] == "r"  # as its line in the log has it
        world.handler.refusal = None
        await call.write(submit("b"))
        await world.handler.until("submit", "b")

    run(body)


@pytest.mark.parametrize("kind", ["submit", "cancel", "orphaned"])
def test_a_sequence_that_the_role_breaks_over_ends_and_the_session_goes_on(kind: str) -> None:
    async def body(world: World) -> None:
        frames = {
            "submit": submit("bad"),
            "cancel": pb.GatewayFrame(cancel=pb.Cancel(sequence_id="bad")),
            "orphaned": pb.GatewayFrame(orphaned=pb.Orphaned(sequence_id="bad")),
        }
        call = await world.welcomed()
        world.handler.breaks_over = (kind, "bad")
        await call.write(frames[kind])
        delta = await next_delta(call)
        assert delta.sequence_id == "bad"
        assert delta.error is not None
        assert delta.error.code == "internal"
        await call.write(submit("good"))
        await world.handler.until("submit", "good")
        ended = [("cancel", "bad")] if kind == "submit" else []
        assert world.handler.log == [*ended, ("submit", "good")], "what a submit had begun is over"

    run(body)


def test_a_sequence_that_does_not_decode_ends_and_the_session_goes_on() -> None:
    async def body(world: World) -> None:
        call = await world.welcomed()
        broken = submit("a")
        del broken.submit.sequence.prompt_token_ids[:]
        await call.write(broken)
        refused = await next_delta(call)
        assert refused.sequence_id == "a"
        assert isinstance(refused.error, InvalidRequest)
        await call.write(submit("b"))
        await world.handler.until("submit", "b")

    run(body)


@pytest.mark.parametrize("name", ["", "bad\nname", "x" * 10_000])
def test_a_sequence_without_a_valid_id_ends_the_session_typed(name: str) -> None:
    async def body(world: World) -> None:
        call = await world.welcomed()
        frame = submit()
        frame.submit.sequence.sequence_id = name
        await call.write(frame)
        error = await error_of(call)
        assert isinstance(error, InvalidRequest)
        assert error.param == "sequence_id"
        await world.handler.until("gone", "g")
        assert ("submit", name) not in world.handler.log

    run(body)


def test_a_frame_out_of_place_ends_its_session_and_no_other() -> None:
    async def body(world: World) -> None:
        call, other = await world.welcomed("g"), await world.welcomed("h")
        await call.write(pb.GatewayFrame())
        assert isinstance(await error_of(call), InvalidRequest)
        await other.write(submit("b"))
        await world.handler.until("submit", "b")
        assert ("gone", "h") not in world.handler.log

    run(body)


@pytest.mark.parametrize(
    ("gateway_id", "version", "code"),
    [
        ("", PROTOCOL_VERSION, "invalid_value"),
        ("g" * 10_000, PROTOCOL_VERSION, "invalid_value"),
        ("g\nand a line of its own", PROTOCOL_VERSION, "invalid_value"),
        ("g", PROTOCOL_VERSION + 1, "kv_load_failed"),
    ],
)
def test_a_hello_that_does_not_fit_is_refused_with_the_reason(
    gateway_id: str, version: int, code: str
) -> None:
    async def body(world: World) -> None:
        call = await world.session(gateway_id, version)
        assert decode_error((await call.read()).refused).code == code
        assert await call.read() is grpc.aio.EOF
        assert world.handler.log == [], "nothing began, so nothing is gone"

    run(body)


def test_a_session_must_begin_with_hello() -> None:
    async def body(world: World) -> None:
        call = world.stub.Session()
        await call.write(submit())
        assert decode_error((await call.read()).refused).code == "invalid_value"

    run(body)


def test_a_second_session_of_a_gateway_waits_until_the_first_has_ended() -> None:
    async def body(world: World) -> None:
        await world.welcomed()
        second = await world.session()
        error = await error_of(second)
        assert isinstance(error, NodeUnavailable)
        assert error.reason == "session_replaced"
        await world.handler.until("gone", "g")
        await world.welcomed()

    run(body)


def test_the_plain_calls_answer_and_their_errors_are_typed() -> None:
    async def body(world: World) -> None:
        assert (await world.stub.Describe(pb.DescribeRequest())).name == "node-1"
        assert (await world.stub.Inspect(pb.InspectRequest())).sequences[0].sequence_id == "s"
        drain = pb.ControlRequest(action=pb.ControlRequest.DRAIN)
        assert (await world.stub.Control(drain)).state == "draining"
        assert ("reset", "prefix cache") not in world.handler.log
        reset = pb.ControlRequest(action=pb.ControlRequest.RESET_PREFIX_CACHE)
        await world.stub.Control(reset)
        assert ("reset", "prefix cache") in world.handler.log
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await world.stub.Control(pb.ControlRequest())
        assert isinstance(error_from_rpc(raised.value), InvalidRequest)

    run(body)


def test_every_gateway_that_hears_states_is_told_and_answers_for_itself() -> None:
    async def body(world: World) -> None:
        one = await world.welcomed("one", hears_state=True)
        other = await world.welcomed("other", hears_state=True)
        await world.welcomed("older")
        world.hub.tell(NodeState.DRAINING)
        for call, awaited in ((one, ["one", "other"]), (other, ["other"])):
            while world.hub.awaited_gateways != awaited:  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.001)
            assert (await world.stub.Inspect(pb.InspectRequest())).awaited_gateways == awaited
            notice = (await call.read()).state_notice
            assert notice.state == "draining"
            heard = pb.StateAnswer(number=notice.number, is_settled=True)
            await call.write(submit(f"before {notice.number}"))
            await call.write(pb.GatewayFrame(state_answer=heard))
        while not world.hub.is_answered:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.001)
        submitted = [name for kind, name in world.handler.log if kind == "submit"]
        assert len(submitted) == 2, "what was sent in front of an answer has been read"

    run(body)


def test_a_gateway_that_goes_in_a_drain_is_not_waited_for() -> None:
    async def body(world: World) -> None:
        call = await world.welcomed("g", hears_state=True)
        world.hub.tell(NodeState.DRAINING)
        assert not world.hub.is_answered
        call.cancel()
        await world.handler.until("gone", "g")
        assert world.hub.is_answered

    run(body)
