"""Plain copies between two nodes, beside which the rate of a hand-off is read.

Life of a copy over a socket
    1. The receiver listens on a port of its own, for one sender, who must know a nonce.
    2. Blocks of `COPY_BYTES` are sent one after the other; each is answered when its last byte has
       come. Nothing is computed from them, and nothing is kept.
    3. The sender closes, after `MAX_COPIES` or `MAX_SECONDS`. All waits are bounded.

Two GPUs of one machine: a slot of the sender's, mapped here, is copied as torch copies memory.

Everything here blocks; run it on a thread.
"""

from __future__ import annotations

import secrets
import socket
import statistics
import struct
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from kv_transfer.transports.tcp_options import open_socket

if TYPE_CHECKING:
    from collections.abc import Callable

COPY_BYTES = 64 << 20
CALL_BYTES = 1 << 20
MAX_COPIES = 8
MAX_SECONDS = 3.0
ANSWER_SECONDS = 5.0
NONCE_BYTES = 16
_ANSWER = b"1"


class PlainListener:
    """Listens on a free port of `host` from its creation on. Raises `OSError`."""

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self._listener.settimeout(ANSWER_SECONDS)
        self.port: int = self._listener.getsockname()[1]
        self.nonce = secrets.token_bytes(NONCE_BYTES)

    def take(self) -> None:
        """What one sender has to send. Raises `OSError` when none comes, or it stops half-way."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            connection, _ = self._listener.accept()
            with connection:
                _bound_waits(connection)
                given = connection.recv(NONCE_BYTES, socket.MSG_WAITALL)
                if secrets.compare_digest(given, self.nonce):
                    _take_all(connection)
                    return
        raise TimeoutError("nobody came who knows the nonce")

    def close(self) -> None:
        self._listener.close()


def _bound_waits(connection: socket.socket) -> None:
    """By the kernel: with a timeout of Python's own no call would wait for all of its bytes."""
    connection.settimeout(None)
    limit = struct.pack("@ll", int(ANSWER_SECONDS), 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def _take_all(connection: socket.socket) -> None:
    data = np.empty(COPY_BYTES, dtype=np.uint8).data
    for _ in range(MAX_COPIES):
        for start in range(0, COPY_BYTES, CALL_BYTES):
            part = data[start : start + CALL_BYTES]
            num_bytes = connection.recv_into(part, 0, socket.MSG_WAITALL)
            if num_bytes == 0 and start == 0:
                return
            if num_bytes < len(part):
                raise ConnectionError("the sender stopped half-way")
        connection.sendall(_ANSWER)


def send_plain(host: str, port: int, nonce: bytes) -> float:
    """Bytes per second to a `PlainListener`. Raises `OSError`."""
    data = np.ones(COPY_BYTES, dtype=np.uint8).data
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with open_socket(family, address) as connection:  # set as KV's own, where that is plain TCP
        connection.settimeout(ANSWER_SECONDS)
        connection.connect(address)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(nonce)

        def copy() -> None:
            for start in range(0, COPY_BYTES, CALL_BYTES):
                connection.sendall(data[start : start + CALL_BYTES])
            if connection.recv(1) != _ANSWER:
                raise ConnectionError("the receiver went away")

        return COPY_BYTES / _median_seconds(copy)


def peer_copy_rate(source: torch.Tensor, target: torch.Tensor) -> float:
    """Bytes per second of copies of another GPU's slot, mapped for ours, into one of ours; as much
    as both have. uint8."""
    num_bytes = min(source.numel(), target.numel())
    with torch.cuda.device(target.device):  # a thread of a pool begins on the first
        stream = torch.cuda.Stream(target.device)  # type: ignore[no-untyped-call]

        def copy() -> None:
            with torch.cuda.stream(stream):
                target[:num_bytes].copy_(source[:num_bytes], non_blocking=True)
            stream.synchronize()

        return num_bytes / _median_seconds(copy)


def _median_seconds(copy: Callable[[], None]) -> float:
    """Of some copies; the first warms up, unless it is the only one there is time for."""
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < MAX_COPIES and time.perf_counter() - began < MAX_SECONDS:
        start = time.perf_counter()
        copy()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:] or seconds)
