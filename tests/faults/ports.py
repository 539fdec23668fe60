"""Ports for programs that must come back to the same address."""

from __future__ import annotations

import random
import socket

HERE, PROXIED = "127.0.0.1", "127.0.0.2"  # where a program listens, and where its proxy does
# Below those of outgoing connections, which would take one before its program does.
FIRST, LAST = 15000, 30000


def free_port() -> int:
    """A port that is free at both addresses now."""
    draw = random.SystemRandom()
    while True:
        port = draw.randint(FIRST, LAST)
        with socket.socket() as here, socket.socket() as there:
            try:
                here.bind((HERE, port))
                there.bind((PROXIED, port))
            except OSError:
                continue
            return port
