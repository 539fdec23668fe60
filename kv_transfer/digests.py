"""Digests that fit one place of one transfer only.

The kernels give a 64-bit digest of each unit (one layer of one block), of the kind that both
nodes agreed on when they paired. Sealing adds 64 bits that stand for what the unit is meant to be:
the transfer, the tenant's salt, the position, the layer and the layout. A unit that is flipped,
swapped, stale, misplaced or another tenant's fails the comparison. It is no MAC: an untrusted wire
needs encryption.

On a device the same is done by `kernels/seal_digests.py`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from kernels.seal_digests import places_of
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


_SEED_BITS = (1 << 63) - 1  # what Triton takes for a signed integer


def digest_seed(transfer_id: bytes, salt: bytes) -> int:
    """63 bits of (transfer, salt, layout version); fields are length-prefixed, so none can
    run into the next."""
    fields = (LAYOUT_VERSION.to_bytes(4, "little"), transfer_id, salt)
    message = b"".join(len(field).to_bytes(4, "little") + field for field in fields)
    digest = hashlib.blake2b(message, digest_size=8, person=b"baton-kv").digest()
    return int.from_bytes(digest, "little") & _SEED_BITS


@dataclass(frozen=True, slots=True)
class PlaceSeal:
    """Seals the digests of a frame's units for the places they are meant for: layers `layer_start
    .. layer_start + num_layers` of the blocks at `positions`."""

    seed: int
    layer_start: int
    num_layers: int
    positions: tuple[int, ...]

    @property
    def num_units(self) -> int:
        return self.num_layers * len(self.positions)

    def seal(self, unit_digests: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """`[num_layers, len(positions)]` -> the same shape. For a fixed place a bijection: two
        contents seal alike only if their unit digests are equal."""
        layers = np.arange(self.layer_start, self.layer_start + self.num_layers, dtype=np.uint64)
        positions = positions_array(self.positions).view(np.uint64)
        return unit_digests + places_of(self.seed, layers[:, None], positions)
