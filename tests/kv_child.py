"""One half of KV transfer over UCX in a process of its own, for tests that kill it.

    python -m tests.kv_child decode TLS
    python -m tests.kv_child prefill TLS ADDRESS NAME INCARNATION HOW

A decode child prints a JSON line with where it is, then one per event of its block source; on
"started" with a digest of the sequence's bytes. A prefill child hands prompts off to the given
node: HOW is "forever", or "half" to stop after the first frame of one prompt.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from typing import TYPE_CHECKING

from cluster.node import Incarnation, NodeId, NodeName
from kv_transfer.transports.tcp import TcpTransport
from kv_transfer.transports.ucx import UcxTransport
from tests.kv_twins import (
    Place,
    decode_side,
    make_request,
    prefill_side,
    until,
)

if TYPE_CHECKING:
    import torch

    from kv_transfer.transports.base import Transport

TABLE = [5, 1, 30, 7, 9, 2, 11, 12]
UNIT_BYTES = 64 * 1024  # frames large enough for rendezvous
OPTIONS = {"unit_bytes": UNIT_BYTES, "staging_slot_bytes": 1 << 20}


def data_transport(tls: str) -> Transport:
    """UCX over these transports, or "plain" TCP."""
    if tls == "plain":
        return TcpTransport(connect_seconds=5.0)
    return UcxTransport(ucx_tls=tls, moves_device_memory=False, connect_seconds=5.0)


def digest_of(pool: torch.Tensor, block_ids: list[int]) -> str:
    return hashlib.sha256(pool[:, block_ids].contiguous().numpy().tobytes()).hexdigest()


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


async def run_decode(tls: str) -> None:
    async with decode_side(data_transport(tls), **OPTIONS) as side:  # type: ignore[arg-type]
        say(
            address=side.address,
            name=side.node_id.name,
            incarnation=side.node_id.incarnation,
            transport=tls,
        )
        num_said = 0
        while True:
            await side.source.changed.wait()
            side.source.changed.clear()
            for what, sequence_id in side.source.log[num_said:]:
                blocks = list(side.source.owned.get(sequence_id, ()))
                say(what=what, sequence=sequence_id, digest=digest_of(side.pool, blocks))
            num_said = len(side.source.log)
            side.source.free.extend(
                block
                for name in list(side.source.first_tokens)
                for block in side.source.owned.pop(name, ())
            )


async def run_prefill(tls: str, address: str, name: str, incarnation: str, how: str) -> None:
    node_id = NodeId(NodeName(name), Incarnation(int(incarnation)))
    async with prefill_side(data_transport(tls), name=f"p-{how}", **OPTIONS) as prefill:  # type: ignore[arg-type]
        decode = Place(address, node_id)
        while True:
            request = make_request(32)
            prefill.hand_off(decode, request)
            if how == "half":
                prefill.sender.chunk_computed(request.sequence_id, 24, TABLE, None)
                await until(lambda: prefill.sender.agent.stats.frames >= 1)
                say(what="half", sequence=request.sequence_id)
                await asyncio.sleep(3600)
            prefill.compute(request, TABLE)
            prefill.sender.commit(request.sequence_id, 1)
            done = request.sequence_id
            await until(lambda done=done: "free" in prefill.owner.of(done))  # type: ignore[misc]
            say(what=prefill.owner.of(done)[0], sequence=done)


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    asyncio.run(run_decode(*arguments) if role == "decode" else run_prefill(*arguments))
