"""The admin API: what runs where, and the levers. On a port and under a token of its own.

Every change is logged with its outcome. Names of nodes and ids of requests are the only values
taken from a path; nothing here takes an address, a file or a command.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import logging
import time
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Query, Request
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.codec import decode_load
from cluster.errors import ConfigError, InvalidRequest, NodeLost, RouteNotFound, ServingError
from cluster.membership_events import Event, StateObserved
from cluster.node import NodeState
from cluster.proto import node_pb2 as pb
from cluster.request import KVLoadFailurePolicy
from cluster.version import VERSION
from gateway.admin.access import HostGuard
from gateway.admin.measuring import measuring_routes
from gateway.admin.views import ended_view, lease_view, node_view, request_views
from gateway.app import documented, translate_errors
from gateway.body import read_object
from gateway.edge import Edge, KeyCheck
from gateway.schemas import invalid

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp

    from cluster.node import NodeLoad
    from gateway.gateway import Gateway
    from gateway.nodes import NodeEntry

logger = logging.getLogger(__name__)
PREFIX = "/admin/v1"
LOAD_SECONDS = 0.5  # for a node to say what it has, before its last heartbeat must do
_ANSWER_PREFIXES = ("chatcmpl-", "cmpl-", "resp_", "msg_")
MAX_SHOWN = 1000
Json = dict[str, Any]


class PolicyChange(BaseModel):
    """`PATCH /admin/v1/policy`: what is named changes, all of it or nothing."""

    model_config = ConfigDict(strict=True, extra="forbid")

    local_prefill_tokens: int | None = None
    stream_interval: int | None = None
    stream_recovery: bool | None = None
    kv_load_failure_policy: Literal["fail", "recompute"] | None = None


def admin_app(
    gateway: Gateway, *, token: str, host: str, observe: Callable[[Event], None]
) -> ASGIApp:
    """`host` is the address it will listen on; `observe` tells membership what nodes answered."""
    if not token:
        raise ConfigError("The admin API needs a token.", param="admin_token")
    app = FastAPI(
        title="Baton admin",
        version=VERSION,
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    translate_errors(app, advice=f"GET {PREFIX}/openapi.json lists them.")
    app.openapi = cache(lambda: documented(app))  # type: ignore[method-assign]
    app.include_router(_views(gateway))
    app.include_router(_requests(gateway))
    app.include_router(_levers(gateway, observe))
    app.include_router(measuring_routes(gateway, PREFIX))
    app.include_router(_policy(gateway))
    keys = KeyCheck(
        [token], "admin token", "Send it as `Authorization: Bearer`, or use `baton admin`."
    )
    return Edge(HostGuard(app, host), keys, open_paths=frozenset())


def _views(gateway: Gateway) -> APIRouter:
    router = APIRouter(prefix=PREFIX, tags=["views"])

    @router.get("/nodes", summary="Nodes, their state and load")
    async def nodes() -> Json:
        entries = list(gateway.nodes)
        said = await asyncio.gather(*(_said_now(entry) for entry in entries))
        now = gateway.clock()
        open_pairs = gateway.dispatcher.pairs.open_pairs(now)
        return {
            "gateway": gateway.dispatcher.gateway_id,
            "nodes": [
                node_view(
                    entry,
                    load,
                    now,
                    model=gateway.model_names[0],
                    num_partners=gateway.nodes.num_partners(entry),
                    awaited_gateways=awaited,
                    open_pairs=open_pairs,
                )
                for entry, (load, awaited) in zip(entries, said, strict=True)
            ],
        }

    @router.get("/leases", summary="Leases of KV that is in transfer, asked of every node")
    async def leases() -> Json:
        entries = [entry for entry in gateway.nodes if entry.client.is_connected]
        replies = await asyncio.gather(*(_inspect(entry) for entry in entries))
        found: list[Json] = []
        silent: list[str] = []
        for entry, reply in zip(entries, replies, strict=True):
            name = entry.info.id.name
            if reply is None:
                silent.append(name)
            else:
                found += [lease_view(name, lease) for lease in reply.leases]
        return {"leases": found, "unreachable": silent}

    return router


def _requests(gateway: Gateway) -> APIRouter:
    """Of this gateway alone: each has requests of its own."""
    router = APIRouter(prefix=f"{PREFIX}/requests", tags=["views"])

    @router.get("", summary="Requests in flight, and where they were placed")
    async def requests(id: str | None = None) -> Json:
        active = gateway.dispatcher.active.values()
        views = request_views(active, gateway.book, gateway.clock())
        return {"requests": [view for view in views if id is None or view["id"] in _ids_of(id)]}

    @router.get("/ended", summary="The last requests that ended, the latest first, and how")
    async def ended(
        id: str | None = None,
        failed: bool = False,
        last: Annotated[int, Query(ge=1, le=MAX_SHOWN)] = MAX_SHOWN,
    ) -> Json:
        found = gateway.book.last(
            last,
            failed_only=failed,
            is_asked_for=lambda each: id is None or each.request_id in _ids_of(id),
        )
        now = time.time()
        return {"requests": [ended_view(at, request, now) for at, request in found]}

    return router


def _levers(gateway: Gateway, observe: Callable[[Event], None]) -> APIRouter:
    router = APIRouter(prefix=PREFIX, tags=["levers"])

    @router.post("/requests/{request_id}:cancel", summary="End a request with a typed error")
    async def cancel(request_id: str) -> Json:
        num_cancelled = sum(map(gateway.dispatcher.cancel_request, _ids_of(request_id)))
        _audit("cancel", request_id, f"{num_cancelled} sequences")
        if num_cancelled == 0:
            raise RouteNotFound(f"No request {request_id[:200]} is in flight.", param="id")
        return {"id": request_id, "num_cancelled": num_cancelled}

    async def order(name: str, action: pb.ControlRequest.Action) -> Json:
        return await _order(_entry(gateway, name), action, observe)

    @router.post("/nodes/{name}:cordon", summary="Give a node no new work")
    async def cordon(name: str) -> Json:
        return await order(name, pb.ControlRequest.CORDON)

    @router.post("/nodes/{name}:uncordon", summary="Give a cordoned node work again")
    async def uncordon(name: str) -> Json:
        return await order(name, pb.ControlRequest.UNCORDON)

    @router.post("/nodes/{name}:drain", summary="Cordon a node and let its work end")
    async def drain(name: str) -> Json:
        return await order(name, pb.ControlRequest.DRAIN)

    @router.post("/prefix-cache:reset", summary="Forget cached blocks on every node")
    async def reset_prefix_cache() -> Json:
        names = [entry.info.id.name for entry in gateway.nodes if entry.client.is_connected]
        failed = []
        for name in names:
            try:
                await order(name, pb.ControlRequest.RESET_PREFIX_CACHE)
            except ServingError as error:
                failed.append(f"{name} ({error.code})")
        if failed:
            raise NodeLost(f"Not reset: {', '.join(failed)}. All other nodes are.")
        return {"nodes": names}

    return router


async def _order(
    entry: NodeEntry, action: pb.ControlRequest.Action, observe: Callable[[Event], None]
) -> Json:
    """Tell a node what to do, and membership what it says."""
    name, verb = entry.info.id.name, pb.ControlRequest.Action.Name(action).lower()
    try:
        reply = await entry.client.calls.control(action)
    except ServingError as error:
        _audit(verb, name, f"failed: {error.code}")
        raise
    _audit(verb, name, reply.state)
    if reply.state in set(NodeState):
        observe(StateObserved(entry.info.id, NodeState(reply.state)))
    return {"name": name, "state": reply.state}


def _policy(gateway: Gateway) -> APIRouter:
    router = APIRouter(prefix=PREFIX, tags=["policy"])

    @router.get("/policy", summary="The policy in force")
    async def show() -> Json:
        return _policy_view(gateway)

    schema = {"content": {"application/json": {"schema": PolicyChange.model_json_schema()}}}

    @router.patch("/policy", summary="Change it, live", openapi_extra={"requestBody": schema})
    async def change(request: Request) -> Json:
        fields = await read_object(
            request.scope, request.receive, max_bytes=16_384, timeout_seconds=10.0
        )
        _check_names(fields)
        try:
            asked = PolicyChange.model_validate(fields)
        except ValidationError as error:
            raise invalid(error) from error
        changes = asked.model_dump(exclude_none=True)
        if "kv_load_failure_policy" in changes:
            changes["kv_load_failure_policy"] = KVLoadFailurePolicy(
                changes["kv_load_failure_policy"]
            )
        gateway.policy.change(**changes)
        _audit("policy", "gateway", str(changes))
        return _policy_view(gateway)

    return router


def _check_names(fields: Json) -> None:
    known = list(PolicyChange.model_fields)
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            advice = f"Did you mean {close[0]}?" if close else f"There are {', '.join(known)}."
            raise InvalidRequest(f"The policy has no {name[:200]!r}. {advice}", param=name)


def _policy_view(gateway: Gateway) -> Json:
    policy = gateway.policy.current
    return {
        "kv_load_failure_policy": policy.kv_load_failure_policy.value,
        "local_prefill_tokens": policy.local_prefill_tokens,
        "stream_interval": policy.stream_interval,
        "stream_recovery": policy.stream_recovery,
    }


async def _said_now(entry: NodeEntry) -> tuple[NodeLoad, list[str]]:
    """Load and awaited gateways as the node says: its last heartbeat is up to a second old, and was
    read half a second later. The load that came with it, of a node that does not answer at once."""
    if entry.client.is_connected:
        with contextlib.suppress(ServingError, TimeoutError):
            async with asyncio.timeout(LOAD_SECONDS):
                reply = await entry.client.calls.inspect()
                return decode_load(reply.load), list(reply.awaited_gateways)
    return entry.info.load, []


async def _inspect(entry: NodeEntry) -> pb.InspectReply | None:
    try:
        return await entry.client.calls.inspect()
    except ServingError as error:
        logger.warning("node %s did not say what it holds: %s", entry.info.id.name, error.message)
        return None


def _entry(gateway: Gateway, name: str) -> NodeEntry:
    entry = gateway.nodes.get(name)
    if entry is None:
        known = ", ".join(sorted(each.info.id.name for each in gateway.nodes)) or "none"
        raise RouteNotFound(f"There is no node {name[:200]}; known: {known}.", param="name")
    return entry


def _ids_of(asked: str) -> list[str]:
    """Of a request: its own, or that of its answer, which clients are shown."""
    bare = (asked.removeprefix(prefix) for prefix in _ANSWER_PREFIXES)
    return [asked, *(each for each in bare if each and each != asked)]


def _audit(action: str, target: str, outcome: str) -> None:
    logger.info(
        "admin action", extra={"action": action, "target": target[:200], "outcome": outcome}
    )
