"""What rank 0 and its workers say to each other, over one Unix socket pair for each worker.

    frame  = kind (1 byte), 3 zero bytes, length of the body (uint32), body
    NOTE   body is a JSON object: start-up, both ways
    STEP   body is a `StepHeader`, then the packed inputs of the step as `InputBuffer` lays them
           out, or, of rows, `RowInputs`: rank 0 to worker only

Nothing is ever unpickled. A closed socket means the other process is gone.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

_FRAME = struct.Struct("<BxxxI")
_STEP = struct.Struct("<B3xIIIII")
_BUFFER_BYTES = 4 << 20
_LONGEST_BODY = 1 << 30


class FrameKind(IntEnum):
    NOTE = 1
    STEP = 2


class StepHeader(NamedTuple):
    """The facts of a step that its tensors do not show. `is_decode`: it has rows."""

    is_decode: bool
    num_tokens: int
    num_rows: int  # 0: tables change, and nothing is computed
    num_samples: int
    table_width: int  # of rows, how many entries of their tables change
    max_seqlen_q: int


class Announce(Protocol):
    """Tells other ranks what is about to run: header and packed inputs."""

    def __call__(self, header: StepHeader, inputs: memoryview) -> None: ...


class Closed(Exception):
    """The other process has closed its end, or has died."""


class Channel:
    """One end. `send_*` and `receive` are each for one thread at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._head = bytearray(_FRAME.size)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)

    def send_note(self, **facts: Any) -> None:
        body = json.dumps(facts).encode()
        self._send([_FRAME.pack(FrameKind.NOTE, len(body)), body])

    def send_step(self, header: StepHeader, inputs: memoryview) -> None:
        length = _STEP.size + inputs.nbytes
        head = _FRAME.pack(FrameKind.STEP, length) + _STEP.pack(*header)
        self._send([head, inputs])

    def receive_note(self) -> dict[str, Any]:
        """Raises `Closed`; `ValueError` when something else comes."""
        kind, length = self.receive_head()
        if kind is not FrameKind.NOTE:
            raise ValueError("a note was expected")
        body = bytearray(length)
        self._fill(memoryview(body))
        facts = json.loads(body)
        if not isinstance(facts, dict):
            raise ValueError("a note must be a JSON object")
        return facts

    def receive_head(self) -> tuple[FrameKind, int]:
        """Kind of the next frame and bytes of its body, which must be received next."""
        self._fill(memoryview(self._head))
        kind, length = _FRAME.unpack(self._head)
        if length > _LONGEST_BODY:
            raise ValueError("a frame is too long")
        return FrameKind(kind), length

    def receive_step_header(self) -> StepHeader:
        head = bytearray(_STEP.size)
        self._fill(memoryview(head))
        is_decode, *sizes = _STEP.unpack(head)
        return StepHeader(bool(is_decode), *sizes)

    def receive_into(self, memory: memoryview) -> None:
        self._fill(memory)

    def send_descriptor(self, descriptor: int) -> None:
        """Pass an open file on."""
        socket.send_fds(self._socket, [b"f"], [descriptor])

    def receive_descriptor(self) -> int:
        data, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1)
        if not data or not descriptors:
            raise Closed
        return descriptors[0]

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the other end was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _send(self, parts: list[bytes | memoryview]) -> None:
        try:
            sent = self._socket.sendmsg(parts)
            for part in parts:
                rest = memoryview(part).cast("B")[min(sent, memoryview(part).nbytes) :]
                sent -= memoryview(part).nbytes - rest.nbytes
                if rest.nbytes:
                    self._socket.sendall(rest)
        except OSError as error:
            raise Closed from error

    def _fill(self, memory: memoryview) -> None:
        while memory.nbytes:
            try:
                count = self._socket.recv_into(memory)
            except OSError as error:
                raise Closed from error
            if count == 0:
                raise Closed
            memory = memory[count:]
