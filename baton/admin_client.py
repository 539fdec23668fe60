"""The admin API of a gateway, from the outside: one call, one JSON object or one typed error.

The token is sent to no address but the one that was asked for: proxies are not used and
redirects are not followed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from cluster.errors import ConfigError, NodeUnavailable, ServingError
from gateway.admin.token_file import read_admin_token

if TYPE_CHECKING:
    from collections.abc import Mapping
    from email.message import Message

DEFAULT_URL = "http://127.0.0.1:8001"
DEFAULT_PORT = 8001
TIMEOUT_SECONDS = 30.0
_PREFIX = "/admin/v1"


class AdminUnreachable(NodeUnavailable):
    """Nothing answers at the admin URL, or it is not an admin API."""


class AdminRefused(ServingError):
    """The admin API answered with an error; the message is its own, or tells what to do."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Message, url: str
    ) -> None:
        return None


@dataclass(frozen=True, slots=True)
class AdminClient:
    """`url` without a path; `token` None sends no credentials."""

    url: str
    token: str | None

    def get(self, path: str) -> dict[str, Any]:
        """GET `/admin/v1` + path. Raises `AdminUnreachable` and `AdminRefused`."""
        return self._call("GET", path, None)

    def patch(self, path: str, changes: Mapping[str, object]) -> dict[str, Any]:
        return self._call("PATCH", path, changes)

    def act(self, collection: str, name: str, verb: str) -> dict[str, Any]:
        """POST `/admin/v1/{collection}/{name}:{verb}`."""
        if not name or "/" in name:  # no name has one: the API would miss the path, not the name
            raise AdminRefused(f"There is no {collection.removesuffix('s')} {name!r}.")
        return self._call(
            "POST", f"/{collection}/{quote(name, safe='', errors='surrogateescape')}:{verb}", {}
        )

    def post(
        self, path: str, body: Mapping[str, object], timeout_seconds: float = TIMEOUT_SECONDS
    ) -> dict[str, Any]:
        """POST `/admin/v1` + path."""
        return self._call("POST", path, body, timeout_seconds)

    def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> dict[str, Any]:
        request = urllib.request.Request(self.url.rstrip("/") + _PREFIX + path, method=method)
        request.add_header("Accept", "application/json")
        if self.token is not None:
            request.add_header("Authorization", f"Bearer {self.token}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())
        try:
            with opener.open(request, timeout=timeout_seconds) as response:
                return self._document(response.read())
        except urllib.error.HTTPError as error:
            raise self._refusal(error, path) from error
        except HTTPException as error:
            raise self._no_admin_api() from error
        except (urllib.error.URLError, OSError, UnicodeError) as error:
            reason = getattr(error, "reason", error)
            detail = getattr(reason, "strerror", None) or reason
            raise AdminUnreachable(f"No admin API answers at {self.url}: {detail}.") from error

    def _document(self, text: bytes) -> dict[str, Any]:
        try:
            document = json.loads(text) if text else {}
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise self._no_admin_api()
        return document

    def _no_admin_api(self) -> AdminUnreachable:
        return AdminUnreachable(f"{self.url} answers, but not as a Baton admin API.")

    def _refusal(self, error: urllib.error.HTTPError, path: str) -> AdminRefused:
        body = b""
        with contextlib.suppress(HTTPException, OSError):
            body = error.read()
        told, param = _told_by(body)
        if error.code == 401:
            hint = (
                "pass --admin-token or set BATON_ADMIN_TOKEN to what its gateway was given. One "
                "that was given none has left its own for its user on its machine, or logged it"
            )
            what = "does not accept this token" if self.token else "wants a token"
            return AdminRefused(f"{self.url} {what}; {hint}.")
        if error.code == 403:
            return AdminRefused(told or f"This token may not do that at {self.url}.")
        if error.code == 404 and (not told or param is None):
            return AdminRefused(
                f"{self.url} has no {_PREFIX}{path}; is it the public port? A gateway's admin API "
                f"is at its --admin-port, {DEFAULT_PORT} unless told otherwise."
            )
        return AdminRefused(told or f"{error.reason} (HTTP {error.code}).")


def admin_client(url: str, token: str | None) -> AdminClient:
    """`token` None: what was left on this machine. Raises `ConfigError` for what is no URL, or no
    token."""
    if token is not None and not (token.isascii() and token.isprintable()):
        raise ConfigError("--admin-token must be printable ASCII.", param="admin_token")
    host, port = _host_and_port(url)
    return AdminClient(url, token or local_token(host, port or DEFAULT_PORT))


def _host_and_port(url: str) -> tuple[str, int | None]:
    """Raises `ConfigError` for what is no URL, and for one with a user: it would be looked up as a
    part of the host's name."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        is_plain = url.isprintable() and " " not in url and "@" not in parts.netloc
        if parts.scheme in ("http", "https") and parts.hostname and is_plain:
            return parts.hostname, parts.port
    raise ConfigError("--admin-url must be an http:// or https:// URL.", param="admin_url")


def local_token(host: str, port: int) -> str | None:
    """The token that was left here. Never for another host: it would be given away."""
    if host != "localhost":
        try:
            if not ipaddress.ip_address(host).is_loopback:
                return None
        except ValueError:
            return None
    return read_admin_token(host, port, os.environ)


def _told_by(body: bytes) -> tuple[str, str | None]:
    """Message and param of `{"error": {…}}`; an empty message when the body is another."""
    try:
        document = json.loads(body)
    except ValueError:
        return "", None
    error = document.get("error") if isinstance(document, dict) else None
    if not isinstance(error, dict):
        return "", None
    return str(error.get("message") or ""), error.get("param")
