"""The options of `baton admin`, of each command as far as it has some of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from baton.admin_client import DEFAULT_URL
from cluster.options import option, refused

_ADMIN = "Admin API"
_REQUESTS = "Requests"
MAX_SHOWN = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminConfig:
    """What every command takes."""

    admin_url: str = option(
        DEFAULT_URL, help="Where the gateway's admin API is.", group=_ADMIN, metavar="URL"
    )
    admin_token: str | None = option(
        None,
        help="Its token. Default: what `baton serve` or `baton gateway` has left on this machine "
        "for this user, if it was given none.",
        group=_ADMIN,
        secret=True,
        metavar="TOKEN",
    )
    output: Literal["table", "json"] = option(
        "table", help="json: the API's own answer.", group="Report", short="-o"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestsConfig:
    ended: bool = option(
        False,
        help="Show the last that ended and how, the latest first, instead of those that run. "
        "A gateway remembers some hundreds of each outcome, of its own requests.",
        group=_REQUESTS,
    )
    failed: bool = option(
        False, help="Of those that ended, the ones whose clients got an error.", group=_REQUESTS
    )
    id: str | None = option(
        None,
        help="Only the request with this x-request-id, or whose answer has this id; whether it "
        "runs or has ended.",
        group=_REQUESTS,
        metavar="REQUEST",
    )
    last: int = option(20, help="Most that are shown of those that ended.", group=_REQUESTS)

    def __post_init__(self) -> None:
        if not 1 <= self.last <= MAX_SHOWN:
            raise refused("last", f"must be in [1, {MAX_SHOWN}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    node: str = option(help="Name of the node.", group="Node")


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainConfig:
    node: str = option(help="Name of the node.", group="Node")
    wait: bool = option(False, help="Return when its work has ended.", group="Node")
    timeout: float | None = option(
        None,
        help="Seconds to wait at most. Then what is left of its work is told, and it drains on.",
        group="Node",
    )

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.wait:
            raise refused("timeout", "needs --wait")
        if self.timeout is not None and not 0 <= self.timeout < math.inf:
            raise refused("timeout", "must be a number of seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelConfig:
    request: str = option(help="Its x-request-id, or the id of its answer.", group="Request")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    setting: tuple[str, ...] = option(
        help="KEY=VALUE of what changes, as `baton admin policy get` names it.",
        group="Policy",
        metavar="KEY=VALUE",
    )
