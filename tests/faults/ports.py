"""Ports for programs that must come back to the same address."""

from __future__ import annotations

import contextlib
import random
import socket

HERE, PROXIED = "127.0.0.1", "127.0.0.2"  # where a program listens, and where its proxy does
# Where a port is kept while its program is down or not there yet, from others who draw.
KEPT = "127.0.0.3"
# Below those of outgoing connections, which would take one before its program does.
FIRST, LAST = 15000, 30000


_kept: list[socket.socket] = []


def free_port() -> int:
    """A port that is free at both addresses now, and that nobody else gets here, in this process
    or another, while this one lives."""
    draw = random.SystemRandom()
    while True:
        port = draw.randint(FIRST, LAST)
        with contextlib.ExitStack() as undo, socket.socket() as here, socket.socket() as there:
            keeper = undo.enter_context(socket.socket())
            try:
                keeper.bind((KEPT, port))
                here.bind((HERE, port))
                there.bind((PROXIED, port))
            except OSError:
                continue
            undo.pop_all()
            _kept.append(keeper)
            return port
