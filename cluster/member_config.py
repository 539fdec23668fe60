"""The options of a node as a member of a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.node import Incarnation, NodeId, NodeName, NodeRole
from cluster.options import option, refused


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

    @property
    def reachable_host(self) -> str:
        return self.advertise_host or self.host

    def lasting_name(self, role: NodeRole) -> str | None:
        """The name it has at every start; None when nothing tells it from others of its role."""
        if not self.node_name and not self.port:
            return None
        return self.node_name or f"{role}-{self.reachable_host}-{self.port}"

    def node_id(self, role: NodeRole, incarnation: Incarnation) -> NodeId:
        name = self.lasting_name(role) or f"{role}-{self.reachable_host}-{incarnation:x}"
        return NodeId(NodeName(name), incarnation)
