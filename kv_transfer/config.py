"""The options of KV transfer, the same on both kinds of node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.options import option, refused
from kv_transfer.receiving.endings import DOUBT_SECONDS

RequiredTransport = Literal["any", "nvlink", "rdma", "shm", "tcp"]

_TRANSFER = "KV transfer"
_MIB = 1 << 20
MAX_SLOT_BYTES = 1 << 30
MAX_SLOTS = 1 << 12


@dataclass(frozen=True, slots=True, kw_only=True)
class KVTransferConfig:
    """How KV moves between nodes. Sizes are bytes, durations seconds."""

    kv_host: str = option(
        "127.0.0.1",
        help="Address that prefill nodes reach this node's KV listener at. 0.0.0.0: the address "
        "they reach its control plane at.",
        group=_TRANSFER,
    )
    kv_port: int = option(
        9200,
        help="Port of this node's KV listener; 0: any free one. Default: 9200; with `baton serve` "
        "always any free one.",
        group=_TRANSFER,
    )
    require_transport: RequiredTransport = option(
        "any",
        help="Refuse a pair of nodes that UCX cannot connect over this kind of transport, and to "
        "start where this machine has none. What is used is in the log and in /metrics.",
        group=_TRANSFER,
    )
    ucx_tls: str | None = option(
        None,
        help="Transports UCX may use (UCX_TLS). Default: all it finds; nodes in host memory without"
        " RDMA use plain TCP instead, unless this is given. Shared memory (sm) is not "
        "recommended: a peer that is killed while it writes can block it for all others.",
        group=_TRANSFER,
    )
    staging_slot_bytes: int | None = option(
        None,
        help="Size of one staging slot, which is the largest frame. Default: 128 MiB on a GPU, "
        "8 MiB on a CPU, 32 MiB where plain TCP leaves the slots empty.",
        group=_TRANSFER,
        advanced=True,
    )
    num_staging_slots: int = option(
        8, help="Staging slots of this node.", group=_TRANSFER, advanced=True
    )
    kv_receive_rate: int = option(
        32,
        help="GB/s at which a node that decodes reads KV from other GPUs of its machine, on "
        "average; the last layer of a prompt, and everything while nothing is decoded, comes as "
        "fast as the link takes it. 0: everything does.",
        group=_TRANSFER,
    )
    lease_seconds: float = option(
        30.0,
        help="How long blocks in transfer are kept for a peer that says nothing.",
        group=_TRANSFER,
        advanced=True,
    )
    drain_seconds: float = option(
        1.0,
        help="How long an aborted transfer may drain before its connection is cut.",
        group=_TRANSFER,
        advanced=True,
    )
    stall_seconds: float = option(
        60.0,
        help="How long a transfer may make no progress while both of its nodes live; for a request "
        "with a deadline half of what it has left, if that is less.",
        group=_TRANSFER,
        advanced=True,
    )
    max_quarantined_share: float = option(
        0.25,
        help="The share of KV blocks or staging slots that cannot be taken back from broken "
        "connections, at which the node ends itself to start afresh.",
        group=_TRANSFER,
        advanced=True,
    )
    fetch_prefixes: bool = option(
        False,
        help="Let prefill nodes fetch a prefix that another node has cached when that is quicker "
        "than computing it, and give away what is cached here, in the pool or in host memory. Set "
        "it on all nodes.",
        group=_TRANSFER,
    )
    max_recomputes: int = option(
        4,
        help="Sequences whose lost KV a decode node computes itself at a time, where the policy "
        "is recompute. More fail.",
        group=_TRANSFER,
        advanced=True,
    )
    recompute_tokens_per_second: float = option(
        4096.0,
        help="Tokens of lost KV that a decode node computes per second, averaged over ten. More "
        "fail.",
        group=_TRANSFER,
        advanced=True,
    )
    pairing_seconds: float = option(
        5.0, help="How long two nodes may take to connect.", group=_TRANSFER, advanced=True
    )

    def __post_init__(self) -> None:
        if not 0 <= self.kv_port < 65536:
            raise refused("kv_port", "must be in [0, 65535]")
        slot_bytes = self.staging_slot_bytes
        if slot_bytes is not None and not 4096 <= slot_bytes <= MAX_SLOT_BYTES:
            raise refused("staging_slot_bytes", f"must be in [4096, {MAX_SLOT_BYTES}]")
        if not 2 <= self.num_staging_slots <= MAX_SLOTS:
            raise refused("num_staging_slots", f"must be in [2, {MAX_SLOTS}]")
        if not 0.0 < self.max_quarantined_share <= 1.0:
            raise refused("max_quarantined_share", "must be in (0, 1]")
        if self.kv_receive_rate < 0:
            raise refused("kv_receive_rate", "must not be negative")
        if self.max_recomputes < 0:
            raise refused("max_recomputes", "must not be negative")
        if not 0.0 <= self.recompute_tokens_per_second < float("inf"):
            raise refused("recompute_tokens_per_second", "must not be negative")
        for name in ("lease_seconds", "drain_seconds", "stall_seconds", "pairing_seconds"):
            if not 0.0 < getattr(self, name) < 86400.0:
                raise refused(name, "must be in (0, 86400)")

    @property
    def receive_bytes_per_second(self) -> float:
        """0: as fast as it goes."""
        return self.kv_receive_rate * 1e9

    @property
    def patience_seconds(self) -> float:
        """How long a read may wait for its turn at the most: too short to be taken for a stall, not
        even of a sender that is doubted, or to hold up a drain."""
        return min(self.drain_seconds / 4, self.stall_seconds / 4, DOUBT_SECONDS / 2)

    def slot_bytes_for(self, device_type: str, *, stays_empty: bool = False) -> int:
        """Bytes of a staging slot on a device of this type ("cpu", "cuda"). One in host memory fits
        the cache; one that stays empty only says how large a frame is, and fewer cost less."""
        if self.staging_slot_bytes is not None:
            return self.staging_slot_bytes
        if device_type != "cpu":
            return 128 * _MIB
        return 32 * _MIB if stays_empty else 8 * _MIB
