"""Ports that are drawn are nobody else's."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from tests.faults import ports

if TYPE_CHECKING:
    import pytest


def test_a_port_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = ports.free_port()
    drawn = iter([first, first + 1])
    monkeypatch.setattr("random.SystemRandom.randint", lambda *_: next(drawn))
    assert ports.free_port() == first + 1


def test_its_program_can_listen_there() -> None:
    port = ports.free_port()
    for address in (ports.HERE, ports.PROXIED):
        with socket.create_server((address, port)):
            pass
