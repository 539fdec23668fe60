"""`baton serve` as an operator starts it, with what the checks ask of a cluster."""

from __future__ import annotations

from urllib.parse import urlsplit

from tests.e2e.cluster_process import ClusterProcess
from tests.faults.ports import free_port


class ServedCluster(ClusterProcess):
    """Ports of the gateway are fixed: it comes back where its clients look for it."""

    def __init__(self, *arguments: str, num_prefill: int = 2, num_decode: int = 2) -> None:
        self.node_names = [f"prefill-{number}" for number in range(num_prefill)]
        self.node_names += [f"decode-{number}" for number in range(num_decode)]
        self.names = [*self.node_names, "gateway"]
        ports = ("--port", str(free_port()), "--admin-port", str(free_port()))
        pools = ("--prefill", str(num_prefill), "--decode", str(num_decode))
        super().__init__(*ports, *pools, *arguments)
        self.gateway_ports = {"gateway": urlsplit(self.base_url).port}

    def url_of(self, _: object) -> str:
        return self.url

    def metrics_address(self, name: str) -> str:
        """Raises `LookupError` while the node is not known."""
        if name == "gateway":
            return urlsplit(self.base_url).netloc
        return str(self.nodes()[name]["metrics_address"])

    def runs_as(self, name: str, pid: int) -> bool:
        """It is this very process, or none."""
        try:
            return self.child(name) == pid
        except LookupError:
            return True

    def is_whole(self) -> bool:
        """All programs serve, and the gateway is connected with every node."""
        try:
            nodes = self.nodes()
            self.child("redis")
        except (OSError, LookupError):
            return False
        return len(nodes) == len(self.node_names) and all(
            node["state"] == "ready" and node["is_connected"] for node in nodes.values()
        )
