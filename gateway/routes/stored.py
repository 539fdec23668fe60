"""What OpenAI's API has for stored responses: none are stored here, and whoever asks is told so."""

from __future__ import annotations

from fastapi import APIRouter

from cluster.errors import Unsupported

_PATH = "/v1/responses/{response_id:path}"


def stored_router() -> APIRouter:
    router = APIRouter()

    @router.get(_PATH, include_in_schema=False)
    @router.post(_PATH, include_in_schema=False)
    @router.delete(_PATH, include_in_schema=False)
    async def refuse() -> None:
        raise Unsupported("No response is stored here: each request brings its whole conversation.")

    return router
