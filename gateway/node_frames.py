"""What a gateway sends to nodes about an attempt."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cluster.codec import encode_handoff, encode_sequence
from cluster.proto import node_pb2 as pb
from cluster.request import Handoff

if TYPE_CHECKING:
    from gateway.active import ActiveSequence


def submit_frame(active: ActiveSequence, gateway_id: str) -> pb.GatewayFrame:
    """To the node that prefills; where another one decodes, with where to hand off."""
    handoff = None
    if active.prefill is not None:
        decode = active.placement.decode
        handoff = Handoff(
            transfer_id=os.urandom(16),
            attempt=active.stream.num_attempts,
            decode=decode.id,
            decode_address=decode.grpc_address,
            gateway_id=gateway_id,
            kv_load_failure_policy=active.stream.kv_load_failure_policy,
            holder=active.placement.holder,
        )
    return pb.GatewayFrame(
        submit=pb.Submit(
            sequence=encode_sequence(active.request),
            handoff=None if handoff is None else encode_handoff(handoff),
        )
    )


def cancel_frame(sequence_id: str) -> pb.GatewayFrame:
    """A node without a session has already ended what it ran for us."""
    return pb.GatewayFrame(cancel=pb.Cancel(sequence_id=sequence_id))


def orphaned_frame(sequence_id: str) -> pb.GatewayFrame:
    """The prefill node is gone: the decode node is to say what it has."""
    return pb.GatewayFrame(orphaned=pb.Orphaned(sequence_id=sequence_id))
