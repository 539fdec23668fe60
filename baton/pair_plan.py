"""What `baton doctor` asks of a probe between two devices; apart from it, for that needs torch."""

from __future__ import annotations

from dataclasses import dataclass


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
