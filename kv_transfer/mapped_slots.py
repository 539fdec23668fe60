"""A node's staging slots, as another process on the same machine may map them.

Life of a mapping
    1. A sender describes its slots once (`describe`), and says so in each hello.
    2. The receiver maps them for its own GPU (`map_slots`), if it can; what it finds there must be
       the proof that the description names, so that no other memory is taken for them.
    3. With the session the mapping goes. A sender that ends, however, takes nothing with it: the
       memory stays until the last mapping is gone.

The receiver reads, and never writes. `None` of all this on other machines: payloads are sent there.
"""

from __future__ import annotations

import json
import logging
import secrets
from typing import TYPE_CHECKING, Any

import torch

from kernels.peer_memory import PeerMemoryUnreachable, export, open_peer

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

PROOF_BYTES = 16
_MAX_DESCRIPTION = 4096


def describe(memory: torch.Tensor, proof_at: torch.Tensor) -> bytes:
    """`memory`: uint8 `[num_slots, bytes of a slot]`, and `proof_at` uint8 `[PROOF_BYTES]`, in the
    same allocation on a GPU."""
    proof = secrets.token_bytes(PROOF_BYTES)
    proof_at.copy_(torch.frombuffer(bytearray(proof), dtype=torch.uint8))
    torch.cuda.synchronize(memory.device)
    num_slots, slot_bytes = memory.shape
    facts = {
        "slots": export(memory),
        "num_slots": num_slots,
        "slot_bytes": slot_bytes,
        "proof_at": export(proof_at),
        "proof": proof.hex(),
    }
    return json.dumps(facts).encode()


def map_slots(description: bytes, device: torch.device) -> Sequence[torch.Tensor]:
    """Each slot of a sender, uint8 `[bytes of a slot]`; none where they cannot be mapped."""
    if not description or len(description) > _MAX_DESCRIPTION:
        return ()
    try:
        facts = json.loads(description)
        with torch.cuda.device(device):
            memory = open_peer(facts["slots"], device)
            found = open_peer(facts["proof_at"], device).cpu().numpy().tobytes()
        return _slots(memory, found, facts)
    except PeerMemoryUnreachable as error:
        logger.info("slots of a prefill node are not mapped: %s", error)
    except (KeyError, TypeError, ValueError) as error:
        logger.warning("slots of a prefill node are described in another way: %r", error)
    return ()


def _slots(memory: torch.Tensor, found: bytes, facts: dict[str, Any]) -> Sequence[torch.Tensor]:
    if found != bytes.fromhex(facts["proof"]) or len(found) != PROOF_BYTES:
        raise ValueError("the memory is not what it was said to be")
    num_slots, slot_bytes = int(facts["num_slots"]), int(facts["slot_bytes"])
    if num_slots * slot_bytes != memory.numel():
        raise ValueError("the slots do not fill their memory")
    return tuple(memory.view(num_slots, slot_bytes))
