"""`GET /v1/models` and `/v1/models/{id}`: what can be asked for, and how long it may be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter

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

    @router.get("/v1/models", summary="List the models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(name) for name in gateway.model_names]}

    @router.get("/v1/models/{model_id:path}", summary="Describe one model")
    async def retrieve_model(model_id: str) -> dict[str, Any]:
        return describe(gateway.model_for(model_id))

    return router
