"""Waiting for a node that drains: until its work has ended, or for as long as one likes, and then
what it waits for."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from baton.admin_client import AdminRefused
from baton.admin_tables import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from baton.admin_client import AdminClient

POLL_SECONDS = 0.5  # a node says its state this often
_WORK = {"num_running": "running", "num_waiting": "waiting", "num_transfers": "in transfer"}
Json = dict[str, Any]


def wait_until_drained(client: AdminClient, name: str, timeout_seconds: float | None) -> str:
    """The state it ends in. Raises `AdminRefused` when it takes work again, or has not ended in
    time. That the gateway has lost it is no end: it may still run what it has, and is reached
    again, or its entry expires."""
    deadline = time.monotonic() + (math.inf if timeout_seconds is None else timeout_seconds)
    while True:
        nodes = client.get("/nodes").get("nodes") or ()
        node = next((node for node in nodes if node.get("name") == name), {"state": "gone"})
        state = node.get("state")
        if state in ("drained", "gone"):
            return str(state)
        if state not in ("draining", "lost"):
            raise AdminRefused(f"{name} is {shown(state)} again: somebody has uncordoned it.")
        if time.monotonic() >= deadline:
            raise AdminRefused(
                f"{name} is {state} after {timeout_seconds:g} s, with {_what_is_left(node)}. It "
                f"goes on; `baton admin uncordon {name}` gives it work again, SIGTERM ends it "
                "within its --shutdown-timeout."
            )
        time.sleep(POLL_SECONDS)


def _what_is_left(node: Json) -> str:
    return ", ".join((*_work_of(node), *_awaited_by(node))) or "nothing that its gateway knows of"


def _work_of(node: Json) -> Iterator[str]:
    load = node.get("load") or {}
    return (f"{load[name]} {what}" for name, what in _WORK.items() if load.get(name))


def _awaited_by(node: Json) -> Iterator[str]:
    return (f"{gateway} yet to settle" for gateway in node.get("awaited_gateways") or ())
