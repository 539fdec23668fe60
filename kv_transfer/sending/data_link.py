"""What was agreed about a pairing: where frames go, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kv_transfer.digests import DigestKind
    from kv_transfer.protocol import FrameLimits
    from kv_transfer.transports.base import Endpoint, PieceEndpoint
    from kv_transfer.transports.local_messages import LocalMessages


@dataclass(frozen=True, slots=True)
class DataLink:
    """Where frames go: `session_id` tags headers, `limits` are those of both ends. `pieces`: the
    endpoint again, if blocks are sent from where they are. `messages`: if the receiver reads our
    slots; headers and commits take these then."""

    endpoint: Endpoint
    session_id: int
    transport_name: str
    limits: FrameLimits
    digest: DigestKind
    pieces: PieceEndpoint | None = None
    messages: LocalMessages | None = None
