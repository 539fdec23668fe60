"""The public HTTP application: FastAPI for routes and documentation, raw ASGI where tokens flow.

`Edge` stands before all of it. Routes that generate are plain ASGI applications inside the
router; their schemas are added to the OpenAPI document by name.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route as HttpRoute

from cluster.errors import InvalidRequest, MethodNotAllowed, RouteNotFound, ServingError
from cluster.version import VERSION
from gateway.dialects.messages_body import CountTokensBody, MessagesBody
from gateway.dialects.messages_errors import message_id
from gateway.dialects.responses_body import ResponsesBody
from gateway.edge import REQUEST_ID, Edge, KeyCheck
from gateway.http_errors import (
    JSON,
    MAX_PATH_CHARS,
    as_serving_error,
    error_answer,
    error_headers,
    log_refusal,
    status_of,
    unexplained,
)
from gateway.request import Route
from gateway.routes.generate import GenerateEndpoint
from gateway.routes.health import health_router
from gateway.routes.models import models_router
from gateway.routes.stored import stored_router
from gateway.routes.tokenize import CountTokensEndpoint, DetokenizeEndpoint, TokenizeEndpoint
from gateway.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prometheus_client import CollectorRegistry
    from pydantic import BaseModel
    from starlette.types import ASGIApp

    from gateway.gateway import Gateway

NOT_FOUND = 404
METHOD_NOT_ALLOWED = 405
_REF = "#/components/schemas/{model}"
_ERROR_SCHEMA = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field that is wrong"},
                "code": {"type": "string", "description": "For programs; Messages have none"},
            },
            "required": ["message", "type"],
        }
    },
    "required": ["error"],
}
_ERROR_ANSWER = {
    "description": "What went wrong",
    "content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}},
}


class _RawRoute(NamedTuple):
    """A plain ASGI application at a path, and what the OpenAPI document says of it."""

    path: str
    endpoint: ASGIApp
    body: type[BaseModel]
    summary: str


def public_app(gateway: Gateway, metrics: CollectorRegistry) -> ASGIApp:
    """Everything on the public port."""
    app = FastAPI(title="Baton", version=VERSION, docs_url=None, redoc_url=None)
    translate_errors(
        app, advice="GET /v1/models lists the models, POST /v1/chat/completions asks one."
    )
    raw = _raw_routes(gateway)
    for route in raw:
        app.router.routes.append(HttpRoute(route.path, route.endpoint, methods=["POST"]))
    app.include_router(models_router(gateway))
    app.include_router(stored_router())
    app.include_router(health_router(gateway, metrics))
    app.openapi = cache(lambda: _document(app, raw))  # type: ignore[method-assign]
    keys = KeyCheck(
        gateway.config.api_key, "API key", "Send it as `Authorization: Bearer` or `x-api-key`."
    )
    edge = Edge(app, keys)
    origins = gateway.config.allowed_origins
    if not origins:
        return edge
    # In front of the key check: a browser asks first, without a key, whether it may send one.
    return CORSMiddleware(
        edge,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "retry-after", "retry-after-ms", "x-should-retry"),
    )


def _raw_routes(gateway: Gateway) -> tuple[_RawRoute, ...]:
    def generate(path: str, route: Route, body: type[BaseModel], summary: str) -> _RawRoute:
        return _RawRoute(path, GenerateEndpoint(gateway, route), body, summary)

    return (
        generate("/v1/chat/completions", Route.CHAT, ChatBody, "Answer a conversation"),
        generate("/v1/completions", Route.COMPLETIONS, CompletionBody, "Continue a text"),
        generate(
            "/v1/responses",
            Route.RESPONSES,
            ResponsesBody,
            "Answer an input, as OpenAI's Responses",
        ),
        generate(
            "/v1/messages",
            Route.MESSAGES,
            MessagesBody,
            "Answer a conversation, as Anthropic's Messages",
        ),
        _RawRoute(
            "/v1/messages/count_tokens",
            CountTokensEndpoint(gateway),
            CountTokensBody,
            "Count the tokens of a conversation",
        ),
        _RawRoute("/tokenize", TokenizeEndpoint(gateway), TokenizeBody, "Text to token ids"),
        _RawRoute("/detokenize", DetokenizeEndpoint(gateway), DetokenizeBody, "Token ids to text"),
    )


def translate_errors(app: FastAPI, *, advice: str) -> None:
    """Whatever a route raises, as an error object. `advice` is for who asks for no route."""

    async def on_serving_error(request: Request, error: Exception) -> Response:
        return refusal(request, as_serving_error(error))

    async def on_http_error(request: Request, error: Exception) -> Response:
        path = request.url.path[:MAX_PATH_CHARS]
        status = error.status_code if isinstance(error, HTTPException) else 500
        if status == NOT_FOUND:
            return refusal(request, RouteNotFound(f"There is no route {path}. {advice}"))
        if isinstance(error, HTTPException) and status == METHOD_NOT_ALLOWED:
            allowed = (error.headers or {}).get("Allow", "another method")
            answer = refusal(request, MethodNotAllowed(f"{path} takes {allowed}."))
            answer.headers["Allow"] = allowed
            return answer
        return refusal(request, as_serving_error(error))

    async def on_invalid(request: Request, error: Exception) -> Response:
        fields = error.errors() if isinstance(error, RequestValidationError) else []
        path = ".".join(str(step) for step in fields[0]["loc"][1:]) if fields else None
        return refusal(request, InvalidRequest("The request is not valid.", param=path))

    async def on_bug(request: Request, _: Exception) -> Response:
        # Raised again by the framework, and logged by `Edge`.
        named = message_id(request.scope, request.scope[REQUEST_ID])
        return error_response(unexplained(), named)

    app.add_exception_handler(Exception, on_bug)
    app.add_exception_handler(ServingError, on_serving_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid)


def refusal(request: Request, error: ServingError) -> Response:
    path = request.url.path
    named = message_id(request.scope, request.scope[REQUEST_ID])
    log_refusal(error, path, status_of(error, named))
    return error_response(error, named)


def error_response(error: ServingError, message_id: str | None = None) -> Response:
    headers = {name.decode(): value.decode() for name, value in error_headers(error)}
    status, body = error_answer(error, message_id)
    return Response(body, status_code=status, media_type=JSON.decode(), headers=headers)


def _document(app: FastAPI, raw: Sequence[_RawRoute]) -> dict[str, Any]:
    """FastAPI's document, with the routes it does not run itself."""
    document = documented(app)
    schemas = document["components"]["schemas"]
    for path, _, body, summary in raw:
        schema = body.model_json_schema(ref_template=_REF)
        schemas.update(schema.pop("$defs", {}))
        schemas[body.__name__] = schema
        reference = {"$ref": _REF.format(model=body.__name__)}
        document["paths"][path] = {
            "post": {
                "summary": summary,
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": reference}},
                },
                "responses": {
                    "200": {"description": "The answer, whole or as events"},
                    "default": _ERROR_ANSWER,
                },
            }
        }
    return document


def documented(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document with our errors in the place of its own, which nobody gets."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Error"] = _ERROR_SCHEMA
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = _ERROR_ANSWER
    return document
