"""A request as every room sees it: validated once, then it cannot be wrong.

The gateway turns what a client sent into one `SequenceRequest` per choice. A node turns it
into a running sequence and answers with `TokenDelta`s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from cluster.errors import InvalidRequest, ServingError

if TYPE_CHECKING:
    from cluster.node import NodeId

MAX_LOGPROBS = 20
MAX_SEED = 2**63


class FinishReason(StrEnum):
    STOP = "stop"  # an end token, a stop id or a stop string
    LENGTH = "length"  # max_tokens, or the model's context is full
    ABORT = "abort"  # cancelled by the client or an operator


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. Raises `InvalidRequest` naming the field when out of range.

    `seed` is always concrete: the gateway draws one when the client gives none, so a retried
    or migrated sequence continues identically. `top_k` 0 means off. `num_logprobs` None means
    none, 0 only the chosen token's.
    """

    max_tokens: int
    seed: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self._check_range("temperature", self.temperature, 0.0, 100.0)
        self._check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        self._check_range("min_p", self.min_p, 0.0, 1.0)
        # Logits are divided by it: near zero nothing finite would be left of them.
        self._check_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        self._check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self._check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for _, bias in self.logit_bias:
            self._check_range("logit_bias", bias, -100.0, 100.0)
        self._check_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        self._check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        self._check_range("top_k", self.top_k, 0, 2**31 - 1)
        self._check_range("seed", self.seed, 0, MAX_SEED - 1)
        if self.num_logprobs is not None:
            self._check_range("top_logprobs", self.num_logprobs, 0, MAX_LOGPROBS)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @staticmethod
    def _check_range(
        name: str, value: float, low: float, high: float, *, low_open: bool = False
    ) -> None:
        inside = low < value <= high if low_open else low <= value <= high
        if not math.isfinite(value) or not inside:
            bracket = "(" if low_open else "["
            raise InvalidRequest(f"{name} must be in {bracket}{low}, {high}].", param=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRequest:
    """One token stream to produce. `cache_salt` separates tenants in the prefix cache.

    `deadline_seconds` is what is left, a duration: instants never cross the wire.

    A stream that goes on elsewhere after its nodes were lost has what the client got at the end
    of its prompt: the last `num_emitted_tokens` of `prompt_token_ids` count as output for
    penalties, limits and `min_tokens`, so it continues as it would have.
    """

    sequence_id: str
    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    cache_salt: bytes = b""
    deadline_seconds: float | None = None
    priority: int = 0  # lower is earlier
    num_emitted_tokens: int = 0


class KVLoadFailurePolicy(StrEnum):
    FAIL = "fail"  # the sequence ends with `kv_load_failed`
    RECOMPUTE = "recompute"  # the decode node computes the missing suffix, inside a budget


@dataclass(frozen=True, slots=True)
class PrefixHolder:
    """A node that is believed to have the first `num_tokens` tokens of a prompt cached, and
    `num_more_tokens` more than who computes it (0: nobody knows)."""

    node: NodeId
    address: str  # "host:port" of its control plane
    num_tokens: int
    num_more_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoff:
    """Where a prefill node sends the KV of one sequence.

    `transfer_id` is 16 random bytes, new for each attempt. `gateway_id` names the session at
    the decode node that gets the tokens. `holder` has more of the prompt cached than the prefill
    node itself; None: nobody is known to.
    """

    transfer_id: bytes
    attempt: int
    decode: NodeId
    decode_address: str  # "host:port" of its control plane
    gateway_id: str
    kv_load_failure_policy: KVLoadFailurePolicy = KVLoadFailurePolicy.FAIL
    holder: PrefixHolder | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of the chosen token, and of the most likely ones, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenDelta(NamedTuple):
    """What one step did for one sequence. A tuple: hundreds are made between two steps.

    Exactly one delta of a sequence has `finish_reason` or `error`: its last. `logprobs` is
    empty or as long as `token_ids`. `num_cached_tokens` is set on a node's first delta.
    `handed_off` (prefill node): the decode node has accepted the KV; more comes from there.
    `started` (decode node): the sequence runs here now, whatever becomes of the prefill node.
    `recomputed` (decode node): the hand-off failed and the decode node computes what is missing,
    so every token comes from here, the first as well.
    """

    sequence_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the id that ended it; it is also the last of token_ids
    num_cached_tokens: int | None = None
    handed_off: bool = False
    started: bool = False
    recomputed: bool = False
    error: ServingError | None = None
