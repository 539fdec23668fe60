"""What a node says of its sequences, to messages and back: tokens, and errors.

As in `codec.py`: encoding trusts its argument, decoding trusts nothing.
"""

from __future__ import annotations

import math

from cluster.codec import MAX_ID_CHARS, MAX_TEXT_CHARS, check_token_ids, checked_id
from cluster.errors import InternalError, InvalidRequest, ServingError, error_classes
from cluster.proto import node_pb2 as pb
from cluster.request import FinishReason, TokenDelta, TokenLogprobs

_FINISH_TO_PROTO = {
    FinishReason.STOP: pb.STOP,
    FinishReason.LENGTH: pb.LENGTH,
    FinishReason.ABORT: pb.ABORT,
}
_FINISH_FROM_PROTO: dict[int, FinishReason | None] = {
    int(number): reason for reason, number in _FINISH_TO_PROTO.items()
}
_FINISH_FROM_PROTO[int(pb.NOT_FINISHED)] = None


def _errors_by_code() -> dict[str, type[ServingError]]:
    """Where classes share a code the parent stands for it; `reason` tells them apart."""
    found: dict[str, type[ServingError]] = {}
    for cls in error_classes():
        if cls is not ServingError:
            found.setdefault(cls.code, cls)
    return found


_ERRORS_BY_CODE = _errors_by_code()


def encode_delta(delta: TokenDelta) -> pb.TokenDelta:
    message = pb.TokenDelta(
        sequence_id=delta.sequence_id,
        token_ids=delta.token_ids,
        handed_off=delta.handed_off,
        started=delta.started,
        recomputed=delta.recomputed,
    )
    for entry in delta.logprobs:
        message.logprobs.add(
            logprob=entry.logprob,
            top_ids=[token_id for token_id, _ in entry.top],
            top_logprobs=[logprob for _, logprob in entry.top],
        )
    if delta.finish_reason is not None:
        message.finish_reason = _FINISH_TO_PROTO[delta.finish_reason]
    if delta.stop_token_id is not None:
        message.stop_token_id = delta.stop_token_id
    if delta.num_cached_tokens is not None:
        message.num_cached_tokens = delta.num_cached_tokens
    if delta.error is not None:
        message.error.CopyFrom(encode_error(delta.error))
    return message


def decode_delta(message: pb.TokenDelta) -> TokenDelta:
    token_ids = tuple(message.token_ids)
    check_token_ids("token_ids", token_ids)
    logprobs = tuple(_decode_logprobs(entry) for entry in message.logprobs)
    if logprobs and len(logprobs) != len(token_ids):
        raise InvalidRequest("logprobs and token_ids differ in length.", param="logprobs")
    number = int(message.finish_reason)
    if number not in _FINISH_FROM_PROTO:
        raise InvalidRequest("finish_reason is unknown.", param="finish_reason")
    finish_reason = _FINISH_FROM_PROTO[number]
    error = decode_error(message.error) if message.HasField("error") else None
    if finish_reason is not None and error is not None:
        raise InvalidRequest("A delta ends once, not in a finish and an error.", param="error")
    return TokenDelta(
        sequence_id=checked_id("sequence_id", message.sequence_id),
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=finish_reason,
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        num_cached_tokens=(
            message.num_cached_tokens if message.HasField("num_cached_tokens") else None
        ),
        handed_off=message.handed_off,
        started=message.started,
        recomputed=message.recomputed,
        error=error,
    )


def _decode_logprobs(message: pb.TokenLogprobs) -> TokenLogprobs:
    if len(message.top_ids) != len(message.top_logprobs):
        raise InvalidRequest("top_ids and top_logprobs differ in length.", param="logprobs")
    if math.isnan(message.logprob) or any(math.isnan(value) for value in message.top_logprobs):
        raise InvalidRequest("A logprob is not a number.", param="logprobs")
    top = tuple(zip(message.top_ids, message.top_logprobs, strict=True))
    return TokenLogprobs(logprob=message.logprob, top=top)


def encode_error(error: ServingError) -> pb.Error:
    return pb.Error(
        code=error.code,
        message=error.message[:MAX_TEXT_CHARS],
        param=error.param or "",
        reason=error.reason or "",
        retry_after_seconds=error.retry_after_seconds or 0.0,
    )


def decode_error(message: pb.Error) -> ServingError:
    """The class that stands for the code; `InternalError` for a code this version lacks."""
    cls = _ERRORS_BY_CODE.get(message.code, InternalError)
    retry_after = message.retry_after_seconds
    return cls(
        message.message[:MAX_TEXT_CHARS] or "The node gave no reason.",
        param=message.param[:MAX_ID_CHARS] or None,
        reason=message.reason[:MAX_ID_CHARS] or None,
        retry_after_seconds=retry_after if 0 < retry_after < math.inf else None,
    )
