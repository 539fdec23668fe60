"""What `baton doctor` asks of a probe between two devices; apart from it, for that needs torch."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.node import HOST

MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class Plan:
    source: str
    target: str
    tls: str | None
    host: str = "127.0.0.1"
    port: int = 0

    @property
    def message_bytes(self) -> int:
        """As large as the staging slots of nodes are by default."""
        return (8 << 20) if self.source == "cpu" else (128 << 20)

    @property
    def num_messages(self) -> int:
        return 16 if self.source == "cpu" else 32


def host_and_port(address: str) -> tuple[str, int]:
    """Of HOST:PORT or [HOST]:PORT; the host may be empty. Raises `ValueError` for anything else."""
    host, colon, port = address.rpartition(":")
    is_host = not host or HOST.fullmatch(host) is not None
    if not (colon and is_host and port.isdecimal() and int(port) <= MAX_PORT):
        raise ValueError(address)
    return host.removeprefix("[").removesuffix("]"), int(port)
