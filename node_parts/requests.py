"""What a node of either role makes of a gateway's request, and tells of those it has."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cluster.prefix_hash import root_hash
from cluster.proto import node_pb2 as pb
from engine.sequence import Sequence, check_request

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cluster.request import SequenceRequest
    from engine.engine import Engine


def runnable(request: SequenceRequest, engine: Engine, model_key: str) -> Sequence:
    """What the engine runs for it. Raises what its model must refuse, before any work."""
    check_request(
        request,
        vocab_size=engine.model_config.vocab_size,
        max_model_len=engine.max_model_len,
    )
    return Sequence(
        request,
        block_size=engine.block_manager.block_size,
        root=root_hash(model_key, request.cache_salt),
    )


def inspect_reply(
    requests: Iterable[tuple[SequenceRequest, str, float]],
    leases: Iterable[pb.LeaseInfo],
    load: pb.NodeLoad,
) -> pb.InspectReply:
    """`requests`: each with its status and when it began, by `time.monotonic`."""
    now = time.monotonic()
    sequences = [
        pb.SequenceInfo(
            sequence_id=request.sequence_id,
            request_id=request.request_id,
            status=status,
            num_prompt_tokens=len(request.prompt_token_ids),
            age_seconds=now - began_at,
        )
        for request, status, began_at in requests
    ]
    return pb.InspectReply(sequences=sequences, leases=leases, load=load)
