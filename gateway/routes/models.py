"""`GET /v1/models` and `/v1/models/{id}`: what can be asked for, and how long it may be."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from gateway.dialects.messages_errors import asks_anthropic

if TYPE_CHECKING:
    from gateway.gateway import Gateway


def models_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["models"])

    def describe(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": gateway.started_at,
            "owned_by": "baton",
            "root": name,
            "parent": None,
            "max_model_len": gateway.nodes.max_model_len(),
            "permission": [],
        }

    def describe_to_anthropic(name: str) -> dict[str, Any]:
        started = datetime.fromtimestamp(gateway.started_at, UTC).isoformat()
        length = gateway.nodes.max_model_len()
        return {
            "type": "model",
            "id": name,
            "display_name": name,
            "created_at": started.replace("+00:00", "Z"),
            "lifecycle": "active",
            "max_input_tokens": length,
            "max_tokens": length,
        }

    @router.get("/v1/models", summary="List the models")
    async def list_models(request: Request) -> dict[str, Any]:
        names = gateway.model_names
        if not asks_anthropic(request.scope):
            return {"object": "list", "data": [describe(name) for name in names]}
        data = [describe_to_anthropic(name) for name in names]
        return {"data": data, "has_more": False, "first_id": names[0], "last_id": names[-1]}

    @router.get("/v1/models/{model_id:path}", summary="Describe one model")
    async def retrieve_model(model_id: str, request: Request) -> dict[str, Any]:
        name = gateway.model_for(model_id)
        return describe_to_anthropic(name) if asks_anthropic(request.scope) else describe(name)

    return router
