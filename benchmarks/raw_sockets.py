"""The plain-socket reference of `benchmarks.host_transfer`: the same bytes, nothing else.

One process sends a buffer, another receives it into a buffer of the same size and says so. What
these programs may choose is chosen by measuring: bytes of a call, and sizes of the socket buffers.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

CALL_BYTES = (256 << 10, 1 << 20, 4 << 20)
BUFFER_BYTES = (0, 4 << 20)  # 0: as the kernel tunes them


@dataclass(frozen=True)
class Setting:
    call_bytes: int
    buffer_bytes: int

    def __str__(self) -> str:
        buffers = f"{self.buffer_bytes >> 20} MiB" if self.buffer_bytes else "the kernel's own"
        return f"{self.call_bytes >> 10} KiB a call, socket buffers {buffers}"


SETTINGS = [Setting(*each) for each in itertools.product(CALL_BYTES, BUFFER_BYTES)]


class RawSockets:
    """A connection to a receiving process, and the bytes to send."""

    def __init__(self, setting: Setting, num_bytes: int) -> None:
        self.setting = setting
        where, theirs = multiprocessing.get_context("spawn").Pipe()
        self._child = multiprocessing.get_context("spawn").Process(
            target=_receive, args=(setting, num_bytes, theirs), daemon=True
        )
        self._child.start()
        self._socket = socket.create_connection(("127.0.0.1", where.recv()))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if setting.buffer_bytes:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, setting.buffer_bytes)
        self._data = memoryview(np.random.default_rng(0).bytes(num_bytes))

    @property
    def pids(self) -> tuple[int, int]:
        return os.getpid(), self._child.pid or 0

    def copy(self) -> float:
        """Seconds until the other process has every byte."""
        step = self.setting.call_bytes
        began = time.perf_counter()
        for start in range(0, len(self._data), step):
            self._socket.sendall(self._data[start : start + step])
        self._socket.recv(1)
        return time.perf_counter() - began

    def close(self) -> None:
        self._socket.close()
        self._child.join(5)


def _receive(setting: Setting, num_bytes: int, where: Connection) -> None:
    with socket.socket() as listener:
        if setting.buffer_bytes:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, setting.buffer_bytes)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        where.send(listener.getsockname()[1])
        connection, _ = listener.accept()
    data = memoryview(bytearray(num_bytes))
    with connection:
        while True:
            for start in range(0, num_bytes, setting.call_bytes):
                part = data[start : start + setting.call_bytes]
                if connection.recv_into(part, 0, socket.MSG_WAITALL) < len(part):
                    return
            connection.sendall(b"1")
