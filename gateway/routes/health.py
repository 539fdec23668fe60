"""Probes, version and metrics: open to everyone who reaches the port.

`/livez` says that the process runs; `/readyz` and `/health` that a request that came now would
be taken by some pair of nodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client.exposition import choose_encoder

from cluster.version import VERSION

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from gateway.gateway import Gateway


def health_router(gateway: Gateway, metrics: CollectorRegistry) -> APIRouter:
    router = APIRouter(tags=["operation"])
    not_ready = {"description": "Not now, and why", "content": {"text/plain": {}}}
    readiness: dict[str, Any] = {
        "response_class": PlainTextResponse,
        "responses": {503: not_ready},
    }

    @router.head("/livez", include_in_schema=False)
    @router.get("/livez", summary="Does the process run?", response_class=PlainTextResponse)
    async def livez() -> Response:
        return Response()

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", summary="May traffic come? If not, why", **readiness)
    async def readyz() -> Response:
        return _readiness(gateway)

    @router.head("/health", include_in_schema=False)
    @router.get("/health", summary="The same as /readyz", **readiness)
    async def health() -> Response:
        return _readiness(gateway)

    @router.get("/version", summary="The version that runs")
    async def version() -> dict[str, str]:
        return {"version": VERSION}

    @router.get(
        "/metrics", summary="Metrics in the Prometheus format", response_class=PlainTextResponse
    )
    async def show_metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics), media_type=content_type)

    return router


def _readiness(gateway: Gateway) -> Response:
    why_not = gateway.why_not_ready()
    if why_not is None:
        return Response()
    return Response(f"Not ready: {why_not}.\n", status_code=503, media_type="text/plain")
