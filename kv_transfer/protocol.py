"""What travels over a data link: frames, and the commit behind the last one.

A frame is a header message in host memory, then a payload message, of one transfer.

    header   fixed fields, positions uint32 [num_positions]
    payload  uint8 [num_layers, num_positions, unit_bytes], from a slot or from the blocks,
             and behind them their sealed digests, uint64 [num_layers, num_positions]

The header says which layers of which block positions the payload holds, so a frame may carry
any rectangle of them: a few layers of all blocks of a chunk as they are computed, or a small chunk
whole. Headers of a session travel under the session's tag and arrive in the order they
were posted; a payload travels under the nonce of its ticket. Both were drawn by the receiver,
so no other peer can know them.

Digests are made and compared where the units are: on a device they never pass through the host.

A receiver that has the sender's slots mapped reads a payload from there. The header then names the
slot, and no payload is sent. Headers and commits take a local socket (`local_messages.py`), and a
message in the other direction says when the slot may be used again.

A commit is a message like a header, behind all headers of its transfer: over the control stream it
would arrive some hundred microseconds later, and a client's second token waits for it.

A header is parsed before anything is allocated or received for it, and everything in it is
checked against what was agreed at the handshake.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from cluster.errors import TransferFailed
from kv_transfer.failures import FailureReason

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAGIC = b"BTKV"
FRAME_VERSION = 2
DIGEST_BYTES = 8
TRANSFER_ID_BYTES = 16
MAX_UNITS_PER_FRAME = 8192

# magic, version, num_layers, layer_start, num_positions, epoch, seq, transfer_id, incarnation,
# nonce, payload_bytes, slot, generation; then the checksum of all other bytes of the header.
_FIXED = struct.Struct("<4sHHHHII16sQQQIQ")
_NO_SLOT = 0xFFFFFFFF
# magic, version, transfer_id, epoch, nonce, num_frames, first_token_id; then the checksum.
_COMMIT = struct.Struct("<4sH16sIQIQ")
COMMIT_MAGIC = b"BTKC"
_SLOT_READ = struct.Struct("<4sIQ")  # magic, slot, generation
SLOT_READ_BYTES = _SLOT_READ.size
_SLOT_READ_MAGIC = b"BTKR"
_CHECKSUM_BYTES = 8
COMMIT_BYTES = _COMMIT.size + _CHECKSUM_BYTES
_PREFIX_BYTES = _FIXED.size + _CHECKSUM_BYTES


class FrameMalformed(TransferFailed):
    """The header cannot be read, so neither can the stream behind it: the link must be cut."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"A KV frame could not be read: {problem}.", reason=FailureReason.FRAME_MALFORMED.value
        )


@dataclass(frozen=True, slots=True)
class SlotName:
    """A slot of the sender's, while one frame owns it (`staging.py`)."""

    index: int
    generation: int


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """One frame. `seq` counts the frames of a transfer from 0.

    `positions` are block positions in the prompt, strictly ascending; layers are `layer_start ..
    layer_start + num_layers`. `slot`: where the payload is to be read; None: it is sent.
    """

    transfer_id: bytes
    incarnation: int  # of the receiver
    epoch: int
    nonce: int
    seq: int
    layer_start: int
    num_layers: int
    positions: tuple[int, ...]
    payload_bytes: int
    slot: SlotName | None = None

    @property
    def num_units(self) -> int:
        return self.num_layers * len(self.positions)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitMessage:
    """All `num_frames` frames of the transfer were posted; its first token is known."""

    transfer_id: bytes
    epoch: int
    nonce: int
    num_frames: int
    first_token_id: int


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """What both ends know before any frame. `slot_bytes`: of units, in one staging slot."""

    num_layers: int
    unit_bytes: int
    slot_bytes: int

    @property
    def max_units(self) -> int:
        """Units (layers of blocks) that one frame may carry."""
        return min(self.slot_bytes // self.unit_bytes, MAX_UNITS_PER_FRAME)

    @property
    def max_payload_bytes(self) -> int:
        return self.payload_bytes(self.max_units)

    @property
    def max_header_bytes(self) -> int:
        return _PREFIX_BYTES + self.max_units * 4

    def payload_bytes(self, num_units: int) -> int:
        """Of so many units and their digests."""
        return num_units * (self.unit_bytes + DIGEST_BYTES)


@lru_cache(maxsize=256)
def positions_array(positions: tuple[int, ...]) -> NDArray[np.int64]:
    """Read only. Kept: every frame of the same blocks has the same positions, and to make an array
    of a tuple takes longer than all else that is done with it."""
    array = np.array(positions, dtype=np.int64)
    array.flags.writeable = False
    return array


def write_header(header: FrameHeader, out: memoryview) -> int:
    """Write the header to the start of `out`; returns its length in bytes."""
    message = pack_header(header)
    out[: len(message)] = message
    return len(message)


def pack_header(header: FrameHeader) -> bytes:
    fixed = _FIXED.pack(
        MAGIC,
        FRAME_VERSION,
        header.num_layers,
        header.layer_start,
        len(header.positions),
        header.epoch,
        header.seq,
        header.transfer_id,
        header.incarnation,
        header.nonce,
        header.payload_bytes,
        _NO_SLOT if header.slot is None else header.slot.index,
        0 if header.slot is None else header.slot.generation,
    )
    positions = _packed_positions(header.positions)
    return fixed + _checksum(fixed, positions) + positions


@lru_cache(maxsize=256)
def _packed_positions(positions: tuple[int, ...]) -> bytes:
    return positions_array(positions).astype("<u4").tobytes()


def pack_slot_read(slot: SlotName) -> bytes:
    """Nobody reads the slot any more."""
    return _SLOT_READ.pack(_SLOT_READ_MAGIC, slot.index, slot.generation)


def parse_slot_read(data: bytes | memoryview) -> SlotName:
    """Raises `FrameMalformed`."""
    if len(data) != SLOT_READ_BYTES:
        raise FrameMalformed("its length is wrong")
    magic, index, generation = _SLOT_READ.unpack(data)
    if magic != _SLOT_READ_MAGIC:
        raise FrameMalformed("its magic is wrong")
    return SlotName(index, generation)


def pack_commit(commit: CommitMessage) -> bytes:
    fields = _COMMIT.pack(
        COMMIT_MAGIC,
        FRAME_VERSION,
        commit.transfer_id,
        commit.epoch,
        commit.nonce,
        commit.num_frames,
        commit.first_token_id,
    )
    return fields + _checksum(fields, b"")


def parse_message(data: memoryview, limits: FrameLimits) -> FrameHeader | CommitMessage:
    """What stands at the start of `data`; bytes after it are ignored. Raises `FrameMalformed`."""
    if bytes(data[: len(COMMIT_MAGIC)]) != COMMIT_MAGIC:
        return parse_header(data, limits)
    size = _COMMIT.size
    fields = bytes(data[:size])
    if bytes(data[size : size + _CHECKSUM_BYTES]) != _checksum(fields, b""):
        raise FrameMalformed("its checksum is wrong")
    _, version, transfer_id, epoch, nonce, num_frames, first_token_id = _COMMIT.unpack(fields)
    if version != FRAME_VERSION:
        raise FrameMalformed("its version is wrong")
    return CommitMessage(
        transfer_id=transfer_id,
        epoch=epoch,
        nonce=nonce,
        num_frames=num_frames,
        first_token_id=first_token_id,
    )


def parse_header(data: memoryview, limits: FrameLimits) -> FrameHeader:
    """The header at the start of `data`; bytes after it are ignored.

    Raises `FrameMalformed`. Every count is checked before it is used as a length.
    """
    if len(data) < _PREFIX_BYTES:
        raise FrameMalformed("it is too short")
    fixed = bytes(data[: _FIXED.size])
    fields = _FIXED.unpack(fixed)
    magic, version, num_layers, _layer_start, num_positions = fields[:5]
    if magic != MAGIC or version != FRAME_VERSION:
        raise FrameMalformed("its magic or version is wrong")
    num_units = num_layers * num_positions
    if not 0 < num_units <= limits.max_units:
        raise FrameMalformed("its size is out of range")
    num_bytes = 4 * num_positions
    if len(data) < _PREFIX_BYTES + num_bytes:
        raise FrameMalformed("it is too short")
    positions = bytes(data[_PREFIX_BYTES : _PREFIX_BYTES + num_bytes])
    if bytes(data[_FIXED.size : _PREFIX_BYTES]) != _checksum(fixed, positions):
        raise FrameMalformed("its checksum is wrong")
    header = _build(fields, positions)
    _check_map(header, limits)
    return header


def _build(fields: tuple[int | bytes, ...], positions: bytes) -> FrameHeader:
    _, _, num_layers, layer_start, _, epoch, seq, transfer_id = fields[:8]
    incarnation, nonce, payload_bytes, slot, generation = fields[8:]
    return FrameHeader(
        transfer_id=bytes(transfer_id),
        incarnation=int(incarnation),
        epoch=int(epoch),
        nonce=int(nonce),
        seq=int(seq),
        layer_start=int(layer_start),
        num_layers=int(num_layers),
        positions=_positions(positions),
        payload_bytes=int(payload_bytes),
        slot=None if slot == _NO_SLOT else SlotName(int(slot), int(generation)),
    )


@lru_cache(maxsize=256)
def _positions(data: bytes) -> tuple[int, ...]:
    """uint32, strictly ascending. Equal ones are one object, as layers of the same blocks follow
    each other."""
    positions = np.frombuffer(data, dtype="<u4")
    if not np.all(positions[1:] > positions[:-1]):
        raise FrameMalformed("its positions are not ascending")
    return tuple(positions.tolist())


def _check_map(header: FrameHeader, limits: FrameLimits) -> None:
    if header.layer_start + header.num_layers > limits.num_layers:
        raise FrameMalformed("its layers are out of range")
    if header.payload_bytes != limits.payload_bytes(header.num_units):
        raise FrameMalformed("its payload does not fit its map")


def _checksum(fixed: bytes, rest: bytes) -> bytes:
    message = fixed + rest
    return hashlib.blake2b(message, digest_size=_CHECKSUM_BYTES, person=b"baton-frame").digest()
