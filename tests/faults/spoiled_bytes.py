"""What an order to a KV link (`kv_link.py`) does to the bytes of a frame."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import torch

from kv_transfer.protocol import (
    DIGEST_BYTES,
    MAX_UNITS_PER_FRAME,
    FrameLimits,
    parse_header,
    write_header,
)

if TYPE_CHECKING:
    from collections import deque

    from tests.faults.kv_link import Message

HUGE = 1 << 40


class Spoil(StrEnum):
    FLIP = "flip"  # one bit of the payload
    FLIP_HEADER = "flip_header"  # one bit of the header
    SWAP = "swap"  # the first and the last unit of the payload, with the digests of both
    STALE = "stale"  # the payload of an earlier frame, maybe another request's
    NAN = "nan"  # the payload's words all ones
    TRUNCATE = "truncate"  # half of the payload
    TRUNCATE_HEADER = "truncate_header"  # half of the header
    LIE = "lie"  # a header, whole and signed, that promises a terabyte
    CUT_BEFORE_HEADER = "cut_before_header"  # the connection ends there
    CUT_BEFORE_PAYLOAD = "cut_before_payload"
    CUT_AFTER_PAYLOAD = "cut_after_payload"
    DELAY = "delay"  # hold this and what follows for `seconds`
    RATE = "rate"  # `bytes_per_second`
    BLACKHOLE = "blackhole"  # never post it
    SWALLOW = "swallow"  # say of it, and of all that follows on this link, that it was sent
    DUPLICATE = "duplicate"  # post it again at once
    LATE = "late"  # post it again after `seconds`
    REORDER = "reorder"  # after the next one


def spoil_bytes(spoil: Spoil, header: Message, payload: Message, kept: deque[torch.Tensor]) -> None:
    """Change copies: what the sender keeps stays right."""
    if spoil is Spoil.LIE:
        header.buffer = lying(header.buffer, payload.buffer.numel())
        return
    target = header if spoil in (Spoil.FLIP_HEADER, Spoil.TRUNCATE_HEADER) else payload
    changed = copy_of(target.buffer)
    half = changed.numel() // 2
    match spoil:
        case Spoil.FLIP | Spoil.FLIP_HEADER:
            changed[half] ^= 1
        case Spoil.SWAP:
            swap_ends(changed, num_units_of(header.buffer))
        case Spoil.STALE:
            source = next((old for old in reversed(kept) if old.numel() == changed.numel()), None)
            if source is None:
                changed = changed.roll(1024)
            else:
                changed.copy_(source)
        case Spoil.NAN:
            changed.fill_(0xFF)
        case Spoil.TRUNCATE | Spoil.TRUNCATE_HEADER:
            changed = changed[:half]
    target.buffer = changed
    _finish(changed)


def copy_of(buffer: torch.Tensor) -> torch.Tensor:
    """It stays as it is now, whatever the slot is used for next."""
    copied = buffer.clone()
    _finish(copied)
    return copied


def _finish(buffer: torch.Tensor) -> None:
    """Who sends it does not look at streams."""
    if buffer.is_cuda:
        torch.cuda.synchronize(buffer.device)


def swap_ends(payload: torch.Tensor, num_units: int) -> None:
    """Each unit fits its digest still, but not its place. A single one has no other: its halves."""
    num_unit_bytes = payload.numel() - num_units * DIGEST_BYTES
    parts = [payload[:num_unit_bytes], payload[num_unit_bytes:]] if num_units > 1 else [payload]
    for part in parts:
        rows = part.view(max(2, num_units), -1)
        first, last = rows[0].clone(), rows[-1].clone()
        rows[0], rows[-1] = last, first


def num_units_of(header: torch.Tensor) -> int:
    num_layers, _, num_positions = np.frombuffer(header.numpy().tobytes()[6:12], "<u2").tolist()
    return int(num_layers * num_positions)


def lying(message: torch.Tensor, payload_bytes: int) -> torch.Tensor:
    """The same header with a payload of a terabyte, and a right checksum over it."""
    unit_bytes = payload_bytes // num_units_of(message) - DIGEST_BYTES
    limits = FrameLimits(1 << 15, unit_bytes, MAX_UNITS_PER_FRAME * unit_bytes)
    header = parse_header(message.numpy().data, limits)
    out = np.zeros(message.numel(), dtype=np.uint8)
    write_header(replace(header, payload_bytes=HUGE), out.data)
    return torch.from_numpy(out)
