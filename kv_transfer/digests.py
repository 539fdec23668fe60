"""Digests that fit one place of one transfer only.

The kernels give a 64-bit digest of each unit (one layer of one block), of the kind that both
nodes agreed on when they paired. Sealing
mixes it with what the unit is meant to be: the transfer, the tenant's salt, the position, the
layer and the layout. A unit that is flipped, swapped, stale, misplaced or another tenant's
fails the comparison. It is no MAC: an untrusted wire needs encryption.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from kv_transfer.protocol import positions_array

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

LAYOUT_VERSION = 1


class DigestKind(StrEnum):
    """How a unit is digested. Every node knows the first."""

    MULTIPLY_SHIFT = "multiply_shift"  # kernels/block_digest.py
    XXH3 = "xxh3"  # kernels/host_digest.py


def agreed_kind(ours: Sequence[DigestKind], theirs: Collection[str]) -> DigestKind:
    """The first of ours, which are ordered by speed, that the peer knows too."""
    return next((kind for kind in ours if kind.value in theirs), DigestKind.MULTIPLY_SHIFT)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_POSITION = np.uint64(0xD6E8FEB86659FD93)
_LAYER = np.uint64(0xA0761D6478BD642F)
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def digest_seed(transfer_id: bytes, salt: bytes) -> int:
    """64 bits of (transfer, salt, layout version); fields are length-prefixed, so none can
    run into the next."""
    fields = (LAYOUT_VERSION.to_bytes(4, "little"), transfer_id, salt)
    message = b"".join(len(field).to_bytes(4, "little") + field for field in fields)
    digest = hashlib.blake2b(message, digest_size=8, person=b"baton-kv").digest()
    return int.from_bytes(digest, "little")


class PlaceSeal:
    """Seals the digests of units for the places they are meant for."""

    __slots__ = ("_layer_start", "_num_layers", "_places", "_positions", "_seed")

    def __init__(
        self, *, seed: int, layer_start: int, num_layers: int, positions: tuple[int, ...]
    ) -> None:
        self._seed = np.uint64(seed)
        self._layer_start = layer_start
        self._num_layers = num_layers
        self._positions = positions
        self._places: NDArray[np.uint64] | None = None

    def prepare(self) -> NDArray[np.uint64]:
        """What depends on the places alone, `[num_layers, len(positions)]`: worth doing while the
        digests are on their way."""
        if self._places is None:
            layers = _layer_terms(self._seed, self._layer_start, self._num_layers)
            self._places = _mix(layers ^ _position_terms(self._positions))
        return self._places

    def seal(self, unit_digests: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """`[num_layers, len(positions)]` -> the same shape. For a fixed place a bijection: two
        contents seal alike only if their unit digests are equal."""
        return _mix(unit_digests ^ self.prepare())


@lru_cache(maxsize=256)
def _layer_terms(seed: np.uint64, layer_start: int, num_layers: int) -> NDArray[np.uint64]:
    """`[num_layers, 1]`; the frames of a transfer share many of them."""
    layers = np.arange(layer_start, layer_start + num_layers, dtype=np.uint64)
    return _mix(seed ^ (layers * _LAYER))[:, None]


@lru_cache(maxsize=256)
def _position_terms(positions: tuple[int, ...]) -> NDArray[np.uint64]:
    return positions_array(positions).view(np.uint64) * _POSITION


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: bijective on 64 bits."""
    x = x + _GOLDEN
    x ^= x >> _SHIFTS[0]
    x *= _FACTORS[0]
    x ^= x >> _SHIFTS[1]
    x *= _FACTORS[1]
    x ^= x >> _SHIFTS[2]
    return x
