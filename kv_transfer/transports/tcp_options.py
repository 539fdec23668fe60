"""How the sockets of plain TCP are set.

On the machine itself nothing is lost and no line is shared, so congestion control has nothing to
control. One that paces (BBR) still deals the bytes out in small parts by a timer: a copy then costs
both processors up to twice the time. Reno, which every Linux has, does not pace; it is
set before the connection is made, as a socket that has paced goes on with it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any

_UNPACED = b"reno"
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: what is still to be sent is for nobody
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


def open_socket(family: int, address: Any) -> socket.socket:
    """A socket to connect to `address` with, as the event loop wants it."""
    connection = socket.socket(family, socket.SOCK_STREAM)
    connection.setblocking(False)
    if _is_here(family, address):
        with contextlib.suppress(OSError):  # the wire's own is right too, only slower
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _UNPACED)
    return connection


def hand_to_threads(connection: socket.socket) -> None:
    """From the event loop to the two threads of a connection."""
    connection.setblocking(True)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    for name, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, name, value)


def _is_here(family: int, address: Any) -> bool:
    """Whether `address` is this machine's: what is sent there would come from there. Asking so
    sends nothing."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(address)
        except OSError:
            return False
        return bool(probe.getsockname()[0] == address[0])
