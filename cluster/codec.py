"""Dataclasses to protobuf messages and back, for both ends of the control plane.

Encoding trusts its argument. Decoding trusts nothing: a peer may be older, broken or hostile,
so every field is checked and anything odd raises `InvalidRequest` naming the field. What nodes say
of sequences, tokens and errors, is in `delta_codec.py`.

Version 2: the commit of a hand-off travels behind its frames; prefixes can be fetched.
Version 3: digests travel behind their units; a frame may name the slot that it is to be read from.
"""

from __future__ import annotations

import math

from cluster.errors import InvalidRequest
from cluster.message_size import message_limit
from cluster.node import Incarnation, NodeId, NodeInfo, NodeLoad, NodeName, NodeRole, NodeState
from cluster.proto import node_pb2 as pb
from cluster.request import (
    Handoff,
    KVLoadFailurePolicy,
    PrefixHolder,
    SamplingParams,
    SequenceRequest,
)

PROTOCOL_VERSION = 3

MAX_ID_CHARS = 256
MAX_SALT_BYTES = 256
MAX_TEXT_CHARS = 4096
TRANSFER_ID_BYTES = 16

_MAX_TOKEN_ID = 2**31 - 1
# Zero means "none" on the wire, so an expired deadline travels as the shortest one.
_SHORTEST_DEADLINE_SECONDS = 1e-6


# ---- sequences ---------------------------------------------------------------------------


def encode_sequence(request: SequenceRequest) -> pb.Sequence:
    message = pb.Sequence(
        sequence_id=request.sequence_id,
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=_encode_sampling(request.sampling),
        cache_salt=request.cache_salt,
        priority=request.priority,
        num_emitted_tokens=request.num_emitted_tokens,
    )
    if request.deadline_seconds is not None:
        message.deadline_seconds = max(request.deadline_seconds, _SHORTEST_DEADLINE_SECONDS)
    return message


def decode_sequence(message: pb.Sequence) -> SequenceRequest:
    prompt = tuple(message.prompt_token_ids)
    if not prompt:
        raise InvalidRequest("The prompt has no tokens.", param="prompt_token_ids")
    check_token_ids("prompt_token_ids", prompt)
    if len(message.cache_salt) > MAX_SALT_BYTES:
        raise InvalidRequest("cache_salt is too long.", param="cache_salt")
    if message.num_emitted_tokens >= min(len(prompt), message.sampling.max_tokens):
        raise InvalidRequest("num_emitted_tokens is out of range.", param="num_emitted_tokens")
    deadline = message.deadline_seconds
    if not math.isfinite(deadline) or deadline < 0:
        raise InvalidRequest("deadline_seconds is out of range.", param="deadline_seconds")
    return SequenceRequest(
        sequence_id=checked_id("sequence_id", message.sequence_id),
        request_id=checked_id("request_id", message.request_id),
        prompt_token_ids=prompt,
        sampling=_decode_sampling(message.sampling),
        cache_salt=message.cache_salt,
        deadline_seconds=deadline or None,
        priority=message.priority,
        num_emitted_tokens=message.num_emitted_tokens,
    )


def _encode_sampling(sampling: SamplingParams) -> pb.Sampling:
    message = pb.Sampling(
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=[pb.LogitBias(token_id=t, bias=b) for t, b in sampling.logit_bias],
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
    )
    if sampling.num_logprobs is not None:
        message.num_logprobs = sampling.num_logprobs
    return message


def _decode_sampling(message: pb.Sampling) -> SamplingParams:
    logit_bias = tuple((entry.token_id, entry.bias) for entry in message.logit_bias)
    check_token_ids("logit_bias", tuple(token_id for token_id, _ in logit_bias))
    stop_token_ids = tuple(message.stop_token_ids)
    check_token_ids("stop_token_ids", stop_token_ids)
    return SamplingParams(
        max_tokens=message.max_tokens,
        seed=message.seed,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=logit_bias,
        num_logprobs=message.num_logprobs if message.HasField("num_logprobs") else None,
        stop_token_ids=stop_token_ids,
        ignore_eos=message.ignore_eos,
    )


# ---- hand-offs ---------------------------------------------------------------------------


def encode_handoff(handoff: Handoff) -> pb.Handoff:
    return pb.Handoff(
        transfer_id=handoff.transfer_id,
        attempt=handoff.attempt,
        decode_name=handoff.decode.name,
        decode_incarnation=handoff.decode.incarnation,
        decode_address=handoff.decode_address,
        gateway_id=handoff.gateway_id,
        kv_load_failure_policy=handoff.kv_load_failure_policy,
        holder=None if handoff.holder is None else _encode_holder(handoff.holder),
    )


def decode_handoff(message: pb.Handoff) -> Handoff:
    return Handoff(
        transfer_id=checked_transfer_id(message.transfer_id),
        attempt=message.attempt,
        decode=_decode_node_id(message.decode_name, message.decode_incarnation),
        decode_address=checked_id("decode_address", message.decode_address),
        gateway_id=checked_id("gateway_id", message.gateway_id),
        kv_load_failure_policy=decode_policy(message.kv_load_failure_policy),
        holder=_decode_holder(message.holder) if message.HasField("holder") else None,
    )


def _encode_holder(holder: PrefixHolder) -> pb.PrefixHolder:
    return pb.PrefixHolder(
        name=holder.node.name,
        incarnation=holder.node.incarnation,
        address=holder.address,
        num_tokens=holder.num_tokens,
        num_more_tokens=holder.num_more_tokens,
    )


def _decode_holder(message: pb.PrefixHolder) -> PrefixHolder:
    return PrefixHolder(
        _decode_node_id(message.name, message.incarnation),
        checked_id("address", message.address),
        message.num_tokens,
        message.num_more_tokens,
    )


def decode_policy(text: str) -> KVLoadFailurePolicy:
    try:
        return KVLoadFailurePolicy(text)
    except ValueError:
        raise InvalidRequest(
            "kv_load_failure_policy is unknown.", param="kv_load_failure_policy"
        ) from None


def checked_transfer_id(transfer_id: bytes) -> bytes:
    if len(transfer_id) != TRANSFER_ID_BYTES:
        raise InvalidRequest("transfer_id must be 16 bytes.", param="transfer_id")
    return transfer_id


# ---- nodes -------------------------------------------------------------------------------


def encode_load(load: NodeLoad) -> pb.NodeLoad:
    return pb.NodeLoad(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        queued_tokens=load.queued_tokens,
        num_blocks=load.num_blocks,
        num_free_blocks=load.num_free_blocks,
        num_cached_blocks=load.num_cached_blocks,
        num_transfers=load.num_transfers,
        num_quarantined_blocks=load.num_quarantined_blocks,
        num_gateways=load.num_gateways,
    )


def decode_load(message: pb.NodeLoad) -> NodeLoad:
    if max(message.num_free_blocks, message.num_cached_blocks) > message.num_blocks:
        raise InvalidRequest("More blocks are free or cached than exist.", param="num_blocks")
    return NodeLoad(
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        queued_tokens=message.queued_tokens,
        num_blocks=message.num_blocks,
        num_free_blocks=message.num_free_blocks,
        num_cached_blocks=message.num_cached_blocks,
        num_transfers=message.num_transfers,
        num_quarantined_blocks=message.num_quarantined_blocks,
        num_gateways=message.num_gateways,
    )


def encode_description(info: NodeInfo, *, version: str) -> pb.NodeDescription:
    """What a node says of itself; `version` is that of the baton distribution."""
    return pb.NodeDescription(
        name=info.id.name,
        incarnation=info.id.incarnation,
        role=info.role,
        state=info.state,
        model_name=info.model_name,
        compatibility_hash=info.compatibility_hash,
        block_size=info.block_size,
        max_model_len=info.max_model_len,
        protocol_version=PROTOCOL_VERSION,
        version=version,
        transports=info.transports,
        fetches_prefixes=info.fetches_prefixes,
        max_message_bytes=message_limit(info.max_model_len),
        load=encode_load(info.load),
    )


def decode_description(
    message: pb.NodeDescription, *, grpc_address: str, metrics_address: str = ""
) -> NodeInfo:
    """The addresses are those it was asked at: a description does not carry them."""
    check_protocol_version(message.protocol_version)
    try:
        role, state = NodeRole(message.role), NodeState(message.state)
    except ValueError:
        raise InvalidRequest("The node's role or state is unknown.", param="role") from None
    if message.block_size < 1 or message.max_model_len < 1:
        raise InvalidRequest("block_size and max_model_len must be positive.", param="block_size")
    return NodeInfo(
        id=_decode_node_id(message.name, message.incarnation),
        role=role,
        state=state,
        grpc_address=grpc_address,
        metrics_address=metrics_address,
        model_name=checked_id("model_name", message.model_name),
        compatibility_hash=checked_id("compatibility_hash", message.compatibility_hash),
        block_size=message.block_size,
        max_model_len=message.max_model_len,
        transports=tuple(checked_id("transports", name) for name in message.transports),
        fetches_prefixes=message.fetches_prefixes,
        load=decode_load(message.load),
    )


def check_protocol_version(version: int) -> None:
    if version != PROTOCOL_VERSION:
        raise InvalidRequest(
            f"The peer speaks protocol version {version}, this process {PROTOCOL_VERSION}.",
            param="protocol_version",
            reason="protocol_version",
        )


def _decode_node_id(name: str, incarnation: int) -> NodeId:
    if not 0 < incarnation < 2**63:
        raise InvalidRequest("incarnation is out of range.", param="incarnation")
    return NodeId(NodeName(checked_id("name", name)), Incarnation(incarnation))


def checked_id(field: str, text: str) -> str:
    """`text`, when it can be an id or a name. Raises `InvalidRequest` naming the field."""
    if not 0 < len(text) <= MAX_ID_CHARS or not text.isprintable():
        raise InvalidRequest(f"{field} is empty, too long or not printable.", param=field)
    return text


def check_token_ids(field: str, token_ids: tuple[int, ...]) -> None:
    if token_ids and max(token_ids) > _MAX_TOKEN_ID:
        raise InvalidRequest(f"{field} holds an id out of range.", param=field)
