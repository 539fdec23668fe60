"""What runs, as plain objects for the admin API. Reads only."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from cluster.node import NodeState
from gateway.request_book import EndedRequest
from gateway.sequence_machine import SequenceState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cluster.node import NodeLoad
    from cluster.proto import node_pb2 as pb
    from gateway.active import ActiveSequence
    from gateway.generation import Generation
    from gateway.nodes import NodeEntry
    from gateway.pair_breaker import OpenPair
    from gateway.request_book import RequestBook

Json = dict[str, Any]

# Earliest first: a request is as far as its last sequence.
_STATES = {
    SequenceState.SUBMITTED: "waiting",
    SequenceState.PREFILLED: "handing_off",
    SequenceState.STARTED: "running",
    SequenceState.FINISHED: "finished",
}
_OF_ENDED = [each.name for each in fields(EndedRequest)]


def node_view(
    entry: NodeEntry,
    load: NodeLoad,
    now: float,
    *,
    model: str,
    num_partners: int,
    awaited_gateways: list[str],
    open_pairs: Iterable[OpenPair],
) -> Json:
    """`load`: as it is now, or as new as it is known. `model`: as clients name it.
    `awaited_gateways`: that have not answered what the node said last of its state. `open_pairs`:
    those that this gateway holds back, whichever nodes they are of."""
    info = entry.info
    return {
        "name": info.id.name,
        "incarnation": str(info.id.incarnation),  # 63 bits: more than JavaScript's numbers hold
        "role": info.role.value,
        "state": info.state.value,
        "model": model,
        "checkpoint": info.model_name,
        "compatibility_hash": info.compatibility_hash,
        "num_partners": num_partners,
        "pairs_held_back": [_pair_view(each) for each in open_pairs if info.id in each.pair],
        "awaited_gateways": awaited_gateways if info.state is NodeState.DRAINING else [],
        "block_size": info.block_size,
        "max_model_len": info.max_model_len,
        "transports": list(info.transports),
        "grpc_address": info.grpc_address,
        "metrics_address": info.metrics_address,
        "is_connected": entry.client.is_connected,
        "age_seconds": entry.client.silent_for(now),
        "load": asdict(load),
        "placed_here": {
            "num_sequences": entry.tally.num_sequences,
            "queued_tokens": entry.tally.queued_tokens,
        },
    }


def _pair_view(held: OpenPair) -> Json:
    prefill, decode = held.pair
    return {
        "prefill_node": prefill.name,
        "decode_node": decode.name,
        "reason": held.reason,
        "tried_again_in_seconds": held.seconds,
    }


def request_views(active: Iterable[ActiveSequence], book: RequestBook, now: float) -> list[Json]:
    """One entry per request, oldest first, with its sequences inside."""
    grouped: dict[int, tuple[Generation, list[ActiveSequence]]] = {}
    for sequence in active:
        generation = book.of_stream(sequence.stream.id)
        if generation is not None:
            grouped.setdefault(id(generation), (generation, []))[1].append(sequence)
    return [_request_view(*each, now) for each in grouped.values()]


def _request_view(generation: Generation, sequences: list[ActiveSequence], now: float) -> Json:
    first = sequences[0]
    order = list(_STATES)
    slowest = min(sequences, key=lambda sequence: order.index(sequence.state))
    first_at = generation.first_at
    return {
        "id": generation.request.request_id,
        "state": _STATES[slowest.state],
        "route": generation.request.route.value,
        "model": generation.request.model,
        "prefill_node": None if first.prefill is None else first.prefill.info.id.name,
        "decode_node": first.decode.info.id.name,
        "num_retries": generation.num_retries,
        "prompt_tokens": generation.num_prompt_tokens,
        "output_tokens": _num_output_tokens(generation, sequences),
        "ttft_seconds": None if first_at is None else first_at - generation.arrived_at,
        "age_seconds": now - generation.arrived_at,
        "sequences": [_sequence_view(sequence, now) for sequence in sequences],
    }


def _num_output_tokens(generation: Generation, sequences: list[ActiveSequence]) -> int:
    """Of those in flight as the nodes have sent them, which may be ahead of who writes the answer;
    with what earlier attempts gave."""
    in_flight = {
        each.stream.id: each.request.num_emitted_tokens + each.num_output_tokens
        for each in sequences
    }
    return sum(
        in_flight.get(run.sequence_id, run.choice.num_output_tokens) for run in generation.runs
    )


def ended_view(ended_at: float, request: EndedRequest, now: float) -> Json:
    """`ended_at` and `now` in Unix seconds."""
    view = {name: getattr(request, name) for name in _OF_ENDED}  # `asdict` takes ten times as long
    ttft_ms, duration_ms = view.pop("ttft_ms"), view.pop("duration_ms")
    return {
        "id": view.pop("request_id"),
        "ended_at": round(ended_at, 3),
        "ended_seconds_ago": max(0.0, now - ended_at),
        **view,
        "ttft_seconds": None if ttft_ms is None else ttft_ms / 1e3,
        "duration_seconds": duration_ms / 1e3,
    }


def _sequence_view(sequence: ActiveSequence, now: float) -> Json:
    return {
        "sequence_id": sequence.request.sequence_id,
        "state": _STATES[sequence.state],
        "prefill_node": None if sequence.prefill is None else sequence.prefill.info.id.name,
        "decode_node": sequence.decode.info.id.name,
        "prompt_tokens": len(sequence.request.prompt_token_ids),
        "output_tokens": sequence.num_output_tokens,
        "age_seconds": now - sequence.began_at,
        "candidates": [
            {
                "node": cost.name,
                "role": cost.role.value,
                "cost_ms": round(cost.cost, 3),
                "cached_tokens": cost.num_cached_tokens,
            }
            for cost in sequence.placement.costs
        ],
        "instead_of": sequence.placement.instead_of,
    }


def lease_view(node: str, lease: pb.LeaseInfo) -> Json:
    return {
        "id": lease.transfer_id.hex(),
        "node": node,
        "sequence_id": lease.sequence_id,
        "peer": lease.peer,
        "state": lease.state,
        "num_blocks": lease.num_blocks,
        "remaining_seconds": lease.expires_in_seconds,
    }
