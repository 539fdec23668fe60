"""Names of KV blocks by content: equal names mean equal keys and values, in every process.

1. `root_hash` names what separates caches: the model with its KV layout (`model_key`), and the
   tenant (`cache_salt`).
2. `hash_blocks` walks a prompt: each full block's hash covers its parent's hash and its token
   ids, so one hash stands for the whole prefix up to and including its block.

The digest is blake2b with 128 bits, personalised by what is hashed, so a root can never be a
block's hash. A block's message is the parent's digest, then its token ids as fixed-width
little-endian uint32: no two token lists share an encoding. The root's message is
length-prefixed: no two pairs of model key and salt share one.

A chain is sequential, so its cost is one call into the digest per block: what can be done for
all tokens at once (the encoding) is, and the personalised state is copied, not rebuilt.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from typing import TYPE_CHECKING, NewType, cast

if TYPE_CHECKING:
    from collections.abc import Sequence

BlockHash = NewType("BlockHash", bytes)

BLOCK_HASH_BYTES = 16

_ROOT_STATE = hashlib.blake2b(digest_size=BLOCK_HASH_BYTES, person=b"baton/root/1")
_BLOCK_STATE = hashlib.blake2b(digest_size=BLOCK_HASH_BYTES, person=b"baton/block/1")
_TOKEN_ID_BYTES = 4
# The C type with 4 bytes, by platform.
_TOKEN_ID_TYPECODE = "I" if array("I").itemsize == _TOKEN_ID_BYTES else "L"


def root_hash(model_key: str, cache_salt: bytes) -> BlockHash:
    """The parent of first blocks. `model_key` covers model, revision and KV layout."""
    key = model_key.encode()
    hasher = _ROOT_STATE.copy()
    hasher.update(len(key).to_bytes(8, "little"))
    hasher.update(key)
    hasher.update(cache_salt)
    return BlockHash(hasher.digest())


def hash_blocks(token_ids: Sequence[int], block_size: int, root: BlockHash) -> list[BlockHash]:
    """The hashes of the full blocks of `token_ids`, first block first.

    To continue a chain, pass the last hash as `root` and the tokens that follow it. Ids must be
    in [0, 2**32) and `root` a digest of this module; `ValueError` otherwise. Blocks of another
    size have other messages, so caches of different block sizes never meet.
    """
    if block_size < 1:
        raise ValueError("block_size must be positive.")
    if len(root) != BLOCK_HASH_BYTES:
        raise ValueError("The root must be a digest.")
    num_tokens = len(token_ids) // block_size * block_size
    if num_tokens == 0:
        return []
    data = _encode(token_ids[:num_tokens])
    stride = block_size * _TOKEN_ID_BYTES
    hashes: list[bytes] = []
    parent: bytes = root
    copy = _BLOCK_STATE.copy
    for start in range(0, len(data), stride):
        hasher = copy()
        hasher.update(parent)  # two calls cost less than one and a concatenation
        hasher.update(data[start : start + stride])
        parent = hasher.digest()
        hashes.append(parent)
    # One cast, not a call of the type per block: that would double the time.
    return cast("list[BlockHash]", hashes)


def _encode(token_ids: Sequence[int]) -> bytes:
    try:
        encoded = array(_TOKEN_ID_TYPECODE, token_ids)
    except (OverflowError, TypeError) as error:
        raise ValueError("A token id is not in [0, 2**32).") from error
    if sys.byteorder == "big":
        encoded.byteswap()
    return encoded.tobytes()
