"""The sessions of one receiver: who may open one, and which connection belongs to which.

Life of a session here (what it does with its frames: `receiver_session.py`)
    1. `open`, if the peer fits and no process of its name has followed it.
    2. Its data endpoint comes, and maybe a connection for messages: each names the session's id.
    3. `remove`, when its connection is to be cut.
"""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING

from cluster.errors import ServingError
from kv_transfer.failures import FailureReason, failure
from kv_transfer.receiving.receiver_session import ReceiverSession
from kv_transfer.receiving.succession import Succession
from kv_transfer.transports.local_messages import LocalListener

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.node import NodeId
    from kv_transfer.agent import TransferAgent
    from kv_transfer.handshake import Compatibility
    from kv_transfer.receiving.paced_reads import PacedReads
    from kv_transfer.receiving.receiver_session import FrameEvents
    from kv_transfer.receiving.tasks import Tasks
    from kv_transfer.transports.base import Endpoint
    from kv_transfer.transports.local_messages import LocalMessages

logger = logging.getLogger(__name__)


class Sessions:
    """Iterates over those that were not removed. `events` hears of frames, and of lost links."""

    def __init__(
        self,
        agent: TransferAgent,
        compatibility: Compatibility,
        events: FrameEvents,
        reads: PacedReads,
        tasks: Tasks,
    ) -> None:
        self._compatibility = compatibility
        self._agent = agent
        self._events = events
        self._reads = reads
        self._tasks = tasks
        self._sessions: dict[int, ReceiverSession] = {}
        self._succession = Succession()
        self._local = LocalListener(
            self._on_messages,
            max_bytes=agent.limits.max_header_bytes,
            hello_seconds=agent.config.pairing_seconds,
        )

    def __iter__(self) -> Iterator[ReceiverSession]:
        return iter(tuple(self._sessions.values()))

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def messages_at(self) -> bytes:
        return self._local.name

    async def listen(self) -> None:
        config = self._agent.config
        await self._agent.transport.listen(config.kv_host, config.kv_port, self._on_endpoint)

    def close(self) -> None:
        """End every session, and take no more connections for messages."""
        self._local.close()
        for session in self:
            self._events.link_lost(session.id, FailureReason.RECEIVER_LOST)

    def find(self, session_id: int) -> ReceiverSession | None:
        return self._sessions.get(session_id)

    def peer_name(self, session_id: int) -> str:
        """Empty of one that was removed."""
        session = self._sessions.get(session_id)
        return "" if session is None else session.peer.name

    def connected_with(self, name: str) -> ReceiverSession | None:
        sessions = (each for each in self if each.peer.name == name)
        return next((session for session in sessions if session.is_connected), None)

    def open(self, peer: NodeId, theirs: Compatibility) -> ReceiverSession:
        """Raises `HandshakeMismatch`, or `TransferFailed` for a process that was replaced. An older
        session of the same node name is ended: that process is gone, or has given it up."""
        try:
            self._compatibility.check(theirs)
        except ServingError as error:
            self._agent.stats.handshakes_refused += 1
            logger.warning("refused prefill node %s: %s", peer.name, error.message)
            raise
        if not self._succession.admit(peer):
            logger.warning("refused an earlier process of prefill node %s", peer.name)
            raise failure(FailureReason.SENDER_REPLACED)
        for session in self:
            if session.peer.name == peer.name:
                self._events.link_lost(session.id, FailureReason.SENDER_LOST)
        session = ReceiverSession(
            secrets.randbits(64), peer, self._agent, self._events, self._reads
        )
        self._sessions[session.id] = session
        return session

    def remove(self, session_id: int) -> ReceiverSession:
        return self._sessions.pop(session_id)

    def _on_endpoint(self, session_id: int, endpoint: Endpoint) -> None:
        session = self._sessions.get(session_id)
        if session is None or session.is_connected:
            logger.warning("closed a KV connection that names no session")
            self._tasks.spawn(_close(endpoint))
            return
        try:
            session.connected(endpoint)
        except ServingError as error:
            logger.warning("refused prefill node %s: %s", session.peer.name, error.message)
            self._tasks.spawn(_close(endpoint))
            self._events.link_lost(session_id, FailureReason.TRANSPORT_REFUSED)
        else:
            self._agent.stats.pairings += 1

    def _on_messages(self, session_id: int, messages: LocalMessages) -> None:
        session = self._sessions.get(session_id)
        if session is None or not session.sender_slots or session.has_messages:
            logger.warning("closed a connection from this machine that names no session")
            messages.close()
        else:
            session.messages_connected(messages)


async def _close(endpoint: Endpoint) -> None:
    await endpoint.close()
