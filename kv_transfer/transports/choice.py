"""Which transport a node opens.

    KV on a GPU        UCX
    in host memory     plain TCP, unless the operator names UCX's transports or requires another
                       kind than TCP, or UCX finds an RDMA device

Both nodes of a pair must choose alike, which they do where machines are alike; a pair that does not
is refused at its first connection, with the option that mends it in the log.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cluster.errors import ConfigError
from kv_transfer.required_transport import check_possible
from kv_transfer.transports.tcp import TcpTransport
from kv_transfer.transports.ucx import UcxTransport, find_transports
from kv_transfer.transports.ucx_lanes import RDMA

if TYPE_CHECKING:
    from kv_transfer.config import KVTransferConfig
    from kv_transfer.transports.base import Transport


def open_transport(config: KVTransferConfig, *, on_device: bool) -> Transport:
    """Raises `ConfigError` when the required transport cannot be had here."""
    if not on_device and takes_plain_tcp(config):
        return TcpTransport(connect_seconds=config.pairing_seconds)
    transport = UcxTransport(
        ucx_tls=config.ucx_tls,
        moves_device_memory=on_device,
        connect_seconds=config.pairing_seconds,
    )
    check_possible(config.require_transport, transport.available, on_device=on_device)
    return transport


def takes_plain_tcp(config: KVTransferConfig) -> bool:
    """Of a node in host memory."""
    if config.ucx_tls is not None or "UCX_TLS" in os.environ:
        return False
    if config.require_transport not in ("any", "tcp"):
        return False
    try:
        found = find_transports()
    except ConfigError:  # UCX is not installed, and not needed
        return True
    return config.require_transport == "tcp" or not any(name.startswith(RDMA) for name in found)
