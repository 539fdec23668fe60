"""How fast KV moves between two nodes, measured by them: `baton doctor --cluster`.

One pair at a time: two measurements would measure each other.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.errors import InvalidRequest, NodeUnavailable, Overloaded, RouteNotFound
from cluster.node import NodeRole
from gateway.body import read_object
from gateway.schemas import invalid

if TYPE_CHECKING:
    from cluster.proto import node_pb2 as pb
    from gateway.gateway import Gateway
    from gateway.nodes import NodeEntry

logger = logging.getLogger(__name__)
Json = dict[str, Any]


class Pair(BaseModel):
    """`POST /admin/v1/hand-offs:measure`: names of two nodes."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prefill: str
    decode: str


def measuring_routes(gateway: Gateway, prefix: str) -> APIRouter:
    router = APIRouter(prefix=prefix, tags=["levers"])
    measuring: list[Pair] = []
    schema = {"content": {"application/json": {"schema": Pair.model_json_schema()}}}

    @router.post(
        "/hand-offs:measure",
        summary="Hand spare blocks of one node to another, and time it",
        openapi_extra={"requestBody": schema},
    )
    async def measure(request: Request) -> Json:
        pair = await _pair(request)
        prefill = _entry(gateway, pair.prefill, NodeRole.PREFILL)
        decode = _entry(gateway, pair.decode, NodeRole.DECODE)
        if measuring:
            busy = f"{measuring[0].prefill} and {measuring[0].decode} are being measured."
            raise Overloaded(busy, reason="measuring", retry_after_seconds=5.0)
        measuring.append(pair)
        try:
            reply = await decode.client.calls.measure(prefill.info)
        finally:
            measuring.clear()
        logger.info(
            "admin action",
            extra={"action": "measure", "target": f"{pair.prefill} to {pair.decode}"[:200]},
        )
        return _view(pair, reply)

    return router


async def _pair(request: Request) -> Pair:
    fields = await read_object(
        request.scope, request.receive, max_bytes=16_384, timeout_seconds=10.0
    )
    try:
        return Pair.model_validate(fields)
    except ValidationError as error:
        raise invalid(error) from error


def _entry(gateway: Gateway, name: str, role: NodeRole) -> NodeEntry:
    entry = gateway.nodes.get(name)
    if entry is None:
        raise RouteNotFound("There is no node of this name.", param=role.value)
    if entry.info.role is not role:
        raise InvalidRequest(f"{name[:200]} is no {role.value} node.", param=role.value)
    if not entry.client.is_connected:
        raise NodeUnavailable(f"{name} is not connected.", reason="not_connected")
    return entry


def _view(pair: Pair, reply: pb.MeasureHandoffReply) -> Json:
    return {
        "prefill": pair.prefill,
        "decode": pair.decode,
        "transport": reply.transport,
        "device": reply.device,
        "num_bytes": reply.num_bytes,
        "unit_bytes": reply.unit_bytes,
        "seconds": reply.seconds,
        "bytes_per_second": reply.num_bytes / reply.seconds if reply.seconds > 0 else 0.0,
        "reference": reply.reference,
        "reference_bytes_per_second": reply.reference_bytes_per_second,
    }
