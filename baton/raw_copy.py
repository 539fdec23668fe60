"""Plain copies, the references beside which the rate of a transport is read.

RawSockets    one buffer to another process over TCP on loopback
memory_rate   one buffer to another in host memory
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import socket
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

COPY_BYTES = 64 << 20
REPEATS = 8
ANSWER_SECONDS = 30.0


@dataclass(frozen=True)
class Setting:
    """What such a program may choose: bytes of a call, of the sockets' buffers (0: as the kernel
    tunes them), and the congestion control ("": the machine's)."""

    call_bytes: int
    buffer_bytes: int
    control: str = ""

    def __str__(self) -> str:
        buffers = f"{self.buffer_bytes >> 20} MiB" if self.buffer_bytes else "the kernel's own"
        control = f", {self.control}" if self.control else ""
        return f"{self.call_bytes >> 10} KiB a call, socket buffers {buffers}{control}"


CALLS = (256 << 10, 1 << 20, 4 << 20)
SETTINGS = [Setting(*each) for each in itertools.product(CALLS, (0, 4 << 20))]
UNPACED_SETTINGS = [Setting(each, 0, "reno") for each in CALLS]


class RawSockets:
    """A connection to a receiving process, its own unless `to` says where one is, and the bytes
    to send."""

    def __init__(self, setting: Setting, num_bytes: int, to: tuple[str, int] | None = None) -> None:
        self._setting = setting
        self._child: RawReceiver | None = None
        if to is None:
            self._child = RawReceiver(setting, num_bytes, "127.0.0.1")
            to = ("127.0.0.1", self._child.port)
        self._socket = _connect(setting, to)
        self._data = _bytes(num_bytes)

    @property
    def pids(self) -> tuple[int, int]:
        return os.getpid(), 0 if self._child is None else self._child.pid

    def copy(self) -> float:
        """Seconds until the other process has every byte."""
        step = self._setting.call_bytes
        began = time.perf_counter()
        for start in range(0, len(self._data), step):
            self._socket.sendall(self._data[start : start + step])
        self._socket.recv(1)
        return time.perf_counter() - began

    def close(self) -> None:
        self._socket.close()
        if self._child is not None:
            self._child.close()


def _connect(setting: Setting, to: tuple[str, int]) -> socket.socket:
    if not setting.control:
        connection = socket.create_connection(to, ANSWER_SECONDS)
    else:  # chosen before it is connected: a socket that has paced goes on with it
        family, _, _, _, address = socket.getaddrinfo(*to, type=socket.SOCK_STREAM)[0]
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.settimeout(ANSWER_SECONDS)
        control = setting.control.encode()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control)
        connection.connect(address)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if setting.buffer_bytes:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, setting.buffer_bytes)
    return connection


@functools.lru_cache(maxsize=1)
def _bytes(num_bytes: int) -> memoryview:
    """An array, as a pool is one: numpy asks for huge pages."""
    return np.random.default_rng(0).integers(0, 256, num_bytes, dtype=np.uint8).data


class RawReceiver:
    """A process that takes one connection, and what it is sent."""

    def __init__(self, setting: Setting, num_bytes: int, host: str) -> None:
        context = multiprocessing.get_context("spawn")
        where, theirs = context.Pipe()
        self._process = context.Process(
            target=_receive, args=(setting, num_bytes, host, theirs), daemon=True
        )
        self._process.start()
        if not where.poll(ANSWER_SECONDS):
            raise TimeoutError("the receiving process did not start")
        self.port = int(where.recv())

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def close(self) -> None:
        """The peer has closed, or never came."""
        self._process.join(ANSWER_SECONDS)
        self._process.kill()


def _receive(setting: Setting, num_bytes: int, host: str, where: Connection) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        if setting.buffer_bytes:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, setting.buffer_bytes)
        listener.bind((host, 0))
        listener.listen()
        where.send(listener.getsockname()[1])
        connection, _ = listener.accept()
    data = np.zeros(num_bytes, dtype=np.uint8).data
    with connection:
        while True:
            for start in range(0, num_bytes, setting.call_bytes):
                part = data[start : start + setting.call_bytes]
                if connection.recv_into(part, 0, socket.MSG_WAITALL) < len(part):
                    return
            connection.sendall(b"1")


PLAIN = Setting(1 << 20, 0)


def socket_rate(to: tuple[str, int] | None = None) -> float:
    """Bytes per second of a plain socket, on loopback or to a `RawReceiver` of `COPY_BYTES`."""
    sockets = RawSockets(PLAIN, COPY_BYTES, to)
    try:
        seconds = [sockets.copy() for _ in range(REPEATS)]
    finally:
        sockets.close()
    return COPY_BYTES / statistics.median(seconds)


def memory_rate() -> float:
    """Bytes per second of one copy in host memory."""
    source = np.ones(COPY_BYTES, dtype=np.uint8)
    target = np.empty_like(source)
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - began)
    return COPY_BYTES / statistics.median(seconds)
