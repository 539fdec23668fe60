"""Ports for programs that must come back to the same address."""

from __future__ import annotations

import socket

HERE, PROXIED = "127.0.0.1", "127.0.0.2"  # where a program listens, and where its proxy does


def free_port() -> int:
    """A port that is free at both addresses now."""
    while True:
        with socket.socket() as here, socket.socket() as there:
            here.bind((HERE, 0))
            port: int = here.getsockname()[1]
            try:
                there.bind((PROXIED, port))
            except OSError:
                continue
            return port
