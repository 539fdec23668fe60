"""What this gateway asks of a node beside its session, one call each."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc

from cluster.errors import NodeLost
from cluster.proto import node_pb2 as pb
from cluster.proto import node_pb2_grpc
from cluster.rpc import error_from_rpc, is_cancelled

if TYPE_CHECKING:
    from cluster.node import NodeInfo

CALL_SECONDS = 5.0
MEASURE_SECONDS = 30.0


class NodeCalls:
    """Each raises the node's typed error, or `NodeLost` when it does not answer, or leaves."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._node: Any = node_pb2_grpc.NodeStub(channel)  # type: ignore[no-untyped-call]
        self._measuring: Any = node_pb2_grpc.MeasuringStub(channel)  # type: ignore[no-untyped-call]

    async def inspect(self) -> pb.InspectReply:
        reply: pb.InspectReply = await _answer(
            self._node.Inspect(pb.InspectRequest(), timeout=CALL_SECONDS)
        )
        return reply

    async def control(self, action: pb.ControlRequest.Action) -> pb.ControlReply:
        reply: pb.ControlReply = await _answer(
            self._node.Control(pb.ControlRequest(action=action), timeout=CALL_SECONDS)
        )
        return reply

    async def measure(self, prefill: NodeInfo) -> pb.MeasureHandoffReply:
        """Of a decode node: what a hand-off from `prefill` takes."""
        asked = pb.MeasureHandoffRequest(name=prefill.id.name, address=prefill.grpc_address)
        reply: pb.MeasureHandoffReply = await _answer(
            self._measuring.MeasureHandoff(asked, timeout=MEASURE_SECONDS)
        )
        return reply


async def _answer(call: Any) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    except asyncio.CancelledError:
        if is_cancelled():
            raise
        raise NodeLost("The node has left.") from None
