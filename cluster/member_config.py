"""The options of a node as a member of a cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cluster.node import HOST, NODE_NAME, Incarnation, NodeId, NodeName, NodeRole
from cluster.options import option, refused
from cluster.redis_client import check_redis_url

_LONGEST_ID = (NodeRole.PREFILL, Incarnation(2**63 - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberConfig:
    """How a node takes part in a cluster."""

    node_name: str = option(
        "", help="Name in the registry, kept over restarts. Default: role, host and port."
    )
    host: str = option("127.0.0.1", help="Address the node's control plane (gRPC) listens on.")
    port: int = option(9100, help="Port of the control plane; 0 takes a free one.")
    advertise_host: str = option(
        "", help="Address at which others reach this node. Default: --host.", advanced=True
    )
    metrics_port: int = option(9400, help="Port of Prometheus metrics; 0 takes a free one.")
    redis_url: str = option(
        "redis://127.0.0.1:6379/0", help="Redis with the registry and prefix index.", secret=True
    )
    shutdown_timeout: float = option(
        60.0, help="Seconds that SIGTERM gives running requests before they are ended."
    )
    log_level: str = option(
        "info", help="Least severe log line shown.", choices=("debug", "info", "warning", "error")
    )

    log_format: str = option(
        "auto",
        help="Form of log lines. auto: for people on a terminal, JSON elsewhere.",
        choices=("auto", "console", "json"),
        advanced=True,
    )

    def __post_init__(self) -> None:
        for name in ("port", "metrics_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise refused(name, "must be a port number")
        if self.shutdown_timeout < 0:
            raise refused("shutdown_timeout", "must not be negative")
        check_redis_url(self.redis_url)
        self._check_names()

    def _check_names(self) -> None:
        """A node that the registry refuses would serve, and nobody know of it."""
        if HOST.fullmatch(self.host) is None:
            raise refused("host", "is no address or name of a host")
        if self.advertise_host and HOST.fullmatch(self.advertise_host) is None:
            raise refused("advertise_host", "is no address or name of a host")
        if NODE_NAME.fullmatch(self.node_id(*_LONGEST_ID).name) is None:
            problem = "must be 1 to 64 letters, digits, '.', '_' and '-', none of these three first"
            if not self.node_name:
                problem = "is needed: with a host of so long a name the default is too long"
            raise refused("node_name", problem)

    @property
    def reachable_host(self) -> str:
        return self.advertise_host or self.host

    @property
    def is_nowhere_else(self) -> bool:
        """Whether others are told an address at which each machine finds itself."""
        return self.reachable_host in ("0.0.0.0", "::", "[::]")

    def lasting_name(self, role: NodeRole) -> str | None:
        """The name it has at every start; None when nothing tells it from others of its role."""
        if not self.node_name and not self.port:
            return None
        return self.node_name or self._default_name(role, str(self.port))

    def node_id(self, role: NodeRole, incarnation: Incarnation) -> NodeId:
        name = self.lasting_name(role) or self._default_name(role, f"{incarnation:x}")
        return NodeId(NodeName(name), incarnation)

    def _default_name(self, role: NodeRole, last: str) -> str:
        return f"{role}-{re.sub(r'[^A-Za-z0-9._-]', '-', self.reachable_host)}-{last}"

    def address(self, port: int) -> str:
        """Where others reach it."""
        host = self.reachable_host
        return f"[{host}]:{port}" if ":" in host and "[" not in host else f"{host}:{port}"
