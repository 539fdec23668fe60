"""Whether a sequence that was lost is tried again on other nodes, and with what.

Life of a stream over its attempts
    1. The first attempt has the stream's own id. Each further one has an id of its own, so that
       whatever an earlier attempt still says is nobody's.
    2. Lost before the client has a token: a *re-dispatch*. Once per stream, and only while the
       retry budget lasts, because a cluster in trouble must not get more work from its gateways.
    3. Lost, or refused, before a token by a node that goes in order (`departure.py`): moved on
       `in_order`. Nothing is in trouble, so it costs neither the budget nor the stream's one
       re-dispatch: in a rolling restart a stream may meet one leaving node after the other. That
       has an end, because none that goes is tried twice.
    4. Lost after k tokens: a *recovery*, where the operator allows it. The prompt and the k tokens
       are prefilled elsewhere. Draws depend on the seed and the position alone, so the client gets
       the tokens it would have got, rounding apart.
    5. The node that failed an attempt takes no further one of the same stream; its partner does
       if there is nobody else. Last of all, a node of which nothing but a hand-off failed
       works with another partner: the link between the two may be all that is broken, and of what
       failed nothing is used again.

An error is worth another attempt when a node or a transfer failed; a request that is wrong, late,
cancelled or too much for the model fails the same way everywhere. Pure: time is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from cluster.errors import NodeUnavailable, ServingError, TransferError
from cluster.request import KVLoadFailurePolicy

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from cluster.node import NodeId
    from cluster.request import SequenceRequest, TokenDelta
    from gateway.router import Placement

MAX_REDISPATCHES = 1
MAX_RECOVERIES = 3
RETRY_SHARE = 0.1  # of the requests; what Google's SRE book advises for a client's retry budget
MAX_SAVED_RETRIES = 10.0
_DECODE_REASONS = ("decode_lost", "commit_unknown", "decode_not_ready", "recompute_differs")
_REASONS_OF_EITHER = (None, "link_lost")
_REFUSALS = ("not_ready", "decode_not_ready")


class RetryKind(StrEnum):
    REDISPATCH = "redispatch"
    IN_ORDER = "in_order"
    RECOVERY = "recovery"


class RetryBudget:
    """A tenth of the requests may be re-dispatched; what was not needed is saved, up to ten."""

    def __init__(self) -> None:
        self.balance = MAX_SAVED_RETRIES

    def deposit(self) -> None:
        """One request was taken in."""
        self.balance = min(MAX_SAVED_RETRIES, self.balance + RETRY_SHARE)

    def withdraw(self) -> bool:
        """False when it is used up."""
        if self.balance < 1.0:
            return False
        self.balance -= 1.0
        return True

    def give_back(self) -> None:
        """Withdrawn, but there was no other node to try."""
        self.balance += 1.0


@dataclass(slots=True)
class Stream:
    """What one listener is owed, whichever attempt gives it.

    `request` is that of the first attempt; `deadline` an instant of the gateway's clock.
    """

    request: SequenceRequest
    deadline: float | None
    recovers: bool  # this and the next are read from the policy once, at its start
    kv_load_failure_policy: KVLoadFailurePolicy = KVLoadFailurePolicy.FAIL
    emitted_token_ids: list[int] = field(default_factory=list)
    num_attempts: int = 1
    num_redispatches: int = 0
    num_recoveries: int = 0
    suspects: set[NodeId] = field(default_factory=set)  # failed an attempt
    avoided: set[NodeId] = field(default_factory=set)  # suspects and their partners
    parted: set[NodeId] = field(default_factory=set)  # suspects of which a hand-off alone failed
    has_token: bool = False

    @property
    def id(self) -> str:
        return self.request.sequence_id

    def deliver(self, delta: TokenDelta) -> None:
        """Note what the client gets."""
        if delta.token_ids:
            self.has_token = True
            if self.recovers:
                self.emitted_token_ids += delta.token_ids

    def retry_kind(
        self, error: ServingError, budget: RetryBudget, *, is_in_order: bool = False
    ) -> RetryKind | None:
        """What an attempt's end in `error` allows; None: the error goes to the client.
        `is_in_order`: by a node that goes, or that takes nothing."""
        if not is_worth_a_retry(error):
            return None
        if self.has_token:
            allowed = self.recovers and self.num_recoveries < MAX_RECOVERIES
            return RetryKind.RECOVERY if allowed else None
        if is_in_order:
            return RetryKind.IN_ORDER
        if self.num_redispatches >= MAX_REDISPATCHES:
            return None
        return RetryKind.REDISPATCH if budget.withdraw() else None

    def next_attempt(
        self,
        kind: RetryKind,
        suspect: NodeId,
        failed: Placement,
        now: float,
        *,
        is_handoff: bool = False,
    ) -> SequenceRequest:
        """The request of the next attempt, after `suspect` failed this one, maybe nothing of it but
        the hand-off."""
        self.num_attempts += 1
        self.num_redispatches += kind is RetryKind.REDISPATCH
        self.num_recoveries += kind is RetryKind.RECOVERY
        self.suspects.add(suspect)
        self.parted.discard(suspect)
        if is_handoff:
            self.parted.add(suspect)
        self.avoided |= {suspect, failed.decode.id}
        if failed.prefill is not None:
            self.avoided.add(failed.prefill.id)
        emitted = tuple(self.emitted_token_ids)
        return replace(
            self.request,
            sequence_id=f"{self.id}.{self.num_attempts}",
            prompt_token_ids=self.request.prompt_token_ids + emitted,
            num_emitted_tokens=len(emitted),
            deadline_seconds=None if self.deadline is None else max(0.0, self.deadline - now),
        )


def is_worth_a_retry(error: ServingError) -> bool:
    return isinstance(error, NodeUnavailable | TransferError)


def who_failed(error: ServingError, placement: Placement, leaving: AbstractSet[NodeId]) -> NodeId:
    """Which node of an attempt an error speaks of. Where it could be either, the one that is
    `leaving`; else the one that prefilled."""
    prefill, decode = placement.prefill, placement.decode.id
    if prefill is None or error.reason in _DECODE_REASONS:
        return decode
    is_decode = decode in leaving and prefill.id not in leaving
    return decode if is_decode and error.reason in _REASONS_OF_EITHER else prefill.id


def is_in_order(error: ServingError, failed: NodeId, leaving: AbstractSet[NodeId]) -> bool:
    """The node that failed goes, or has refused because it takes nothing any more."""
    is_refusal = isinstance(error, NodeUnavailable) and error.reason in _REFUSALS
    return is_refusal or failed in leaving
