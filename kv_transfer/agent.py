"""What one process needs to move KV: a transport, staging slots, the pool, counters.

Life of an agent
    1. Created at start, on the event loop: staging is allocated, the transport opened.
    2. A receiver listens, a sender connects; both use the slots and the pool from here.
    3. `close`, after every transfer has ended: endpoints, listener, then the pool's thread.
"""

from __future__ import annotations

import copy
import logging
import sys
from typing import TYPE_CHECKING

import torch

from cluster.errors import ServingError
from kv_transfer.mapped_slots import map_slots
from kv_transfer.pool import TransferPool
from kv_transfer.protocol import FrameLimits
from kv_transfer.quarantine import Quarantine
from kv_transfer.rehearsal import Rehearsal
from kv_transfer.required_transport import check_in_use
from kv_transfer.staging import Staging
from kv_transfer.stats import TransferStats
from kv_transfer.transports.base import PieceEndpoint
from kv_transfer.transports.choice import open_transport
from kv_transfer.transports.tcp import TcpTransport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kv_transfer.config import KVTransferConfig
    from kv_transfer.digests import DigestKind
    from kv_transfer.transports.base import Endpoint, Transport

logger = logging.getLogger(__name__)

# Frames of one peer. One is on the wire, the next stands ready; more would only have to drain when
# a transfer is aborted.
_PIECES_ON_THEIR_WAY = 2

# A loop that asks the device for events does not sleep while KV moves. With Python's 5 ms the
# engine's thread would wait that long for the interpreter, again and again in a decode step.
_SWITCH_SECONDS = 0.0003


class TransferAgent:
    """One per process."""

    def __init__(
        self,
        pools: Sequence[torch.Tensor],
        config: KVTransferConfig,
        transport: Transport,
        *,
        takes_digests: bool = True,
    ) -> None:
        """`pools`, `takes_digests`: as `TransferPool` has them; one pool for each rank of the
        model. Raises `ConfigError` when a staging slot is too small for one unit."""
        self.config = config
        self.transport = transport
        self.pool = TransferPool(*pools, takes_digests=takes_digests)
        if self.pool.device.type == "cuda":
            self.pool.rehearsal = Rehearsal(pools)
        self.stats = TransferStats()
        in_pieces = self.pool.has_pieces(self.pool.digest_kinds[0])
        self._sends_pieces = in_pieces and isinstance(transport, TcpTransport)
        slot_bytes = config.slot_bytes_for(self.pool.device.type, stays_empty=self._sends_pieces)
        self.limits = FrameLimits(self.pool.num_layers, self.pool.unit_bytes, slot_bytes)
        self.quarantine = Quarantine(
            num_blocks=pools[0].shape[1], max_share=config.max_quarantined_share
        )
        self.stagings: list[Staging] = []  # of all agents beside each other
        self.staging = self._make_staging(config.num_staging_slots)
        self._in_use: dict[Endpoint, str] = {}

    @classmethod
    def create(
        cls,
        pools: Sequence[torch.Tensor],
        config: KVTransferConfig,
        *,
        takes_digests: bool = True,
    ) -> TransferAgent:
        """Over the transport that fits (`transports/choice.py`). The event loop's thread is bound
        to the device of the first pool. Raises `ConfigError` when the required transport cannot be
        had here."""
        device = pools[0].device
        if device.type == "cuda":
            sys.setswitchinterval(_SWITCH_SECONDS)
            torch.cuda.set_device(device)
            torch.cuda.synchronize(device)
        transport = open_transport(config, on_device=device.type == "cuda")
        return cls(pools, config, transport, takes_digests=takes_digests)

    def beside(self, num_slots: int) -> TransferAgent:
        """The same agent with `num_slots` staging slots apart from the others: for who receives
        while another part of this process sends, so that neither can starve the other."""
        other = copy.copy(self)
        other.staging = self._make_staging(num_slots)
        return other

    @property
    def transports_in_use(self) -> tuple[str, ...]:
        """What carries payloads to and from the peers connected now. Any thread may ask."""
        names = list(self._in_use.values())  # copied in one step, before anything else
        return tuple(sorted(set(names)))

    def admit(self, endpoint: Endpoint) -> str:
        """The transport of a new connection. Raises `TransferFailed` when the operator
        requires another kind."""
        name = endpoint.transport_name
        try:
            on_device = self.pool.device.type == "cuda"
            check_in_use(self.config.require_transport, name, endpoint.lanes, on_device=on_device)
        except ServingError:
            self.stats.handshakes_refused += 1
            raise
        self._in_use[endpoint] = name
        endpoint.on_close(lambda: self._forget(endpoint))
        return name

    def pieces_of(self, endpoint: Endpoint, digest: DigestKind) -> PieceEndpoint | None:
        """The endpoint, if it moves blocks from and to where they are, without slots."""
        if isinstance(endpoint, PieceEndpoint) and self.pool.has_pieces(digest):
            return endpoint
        return None

    async def settled(self) -> bool:
        """Wait until every device operation of this process on slots and blocks has ended. False
        when nobody can say that: the device is lost, and where nothing is computed, no step finds
        out, so it is told here."""
        try:
            await self.pool.settle()
        except Exception:
            logger.exception("the device does not say any more what has ended")
            self.quarantine.lost_device()
            return False
        return True

    def map_slots(self, description: bytes) -> Sequence[torch.Tensor]:
        """The slots of a sender, for our device; none where they cannot be mapped. Any thread."""
        return map_slots(description, self.pool.device) if self.pool.device.type == "cuda" else ()

    def _make_staging(self, num_slots: int) -> Staging:
        staging = Staging(
            slot_bytes=self.limits.slot_bytes,
            num_slots=num_slots,
            limits=self.limits,
            device=self.pool.device,
            max_share=_PIECES_ON_THEIR_WAY if self._sends_pieces else None,
        )
        self.stagings.append(staging)
        self.quarantine.num_slots += num_slots
        return staging

    def _forget(self, endpoint: Endpoint) -> None:
        self._in_use.pop(endpoint, None)

    async def close(self) -> None:
        await self.transport.close()
        self.pool.close()
