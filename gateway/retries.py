"""Whether a sequence that was lost is tried again on other nodes, and with what.

Life of a stream over its attempts
    1. The first attempt has the stream's own id. Each further one has an id of its own, so that
       whatever an earlier attempt still says is nobody's.
    2. Lost before the client has a token: a *re-dispatch*. Once per stream, and only while the
       retry budget lasts, because a cluster in trouble must not get more work from its gateways.
       What a node that leaves in order had not begun is in no trouble, and costs nothing; it is
       counted as `in_order`.
    3. Lost after k tokens: a *recovery*, where the operator allows it. The prompt and the k tokens
       are prefilled elsewhere. Draws depend on the seed and the position alone, so the client gets
       the tokens it would have got.
    4. The node that failed an attempt takes no further one of the same stream; its partner does
       if there is nobody else.

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
    from cluster.node import NodeId
    from cluster.request import SequenceRequest, TokenDelta
    from gateway.router import Placement

MAX_REDISPATCHES = 1
MAX_RECOVERIES = 3
RETRY_SHARE = 0.1  # of the requests; what Google's SRE book advises for a client's retry budget
MAX_SAVED_RETRIES = 10.0
_DECODE_REASONS = ("decode_lost", "commit_unknown", "decode_not_ready")
_REFUSALS = ("not_ready", "decode_not_ready")


class RetryKind(StrEnum):
    REDISPATCH = "redispatch"
    RECOVERY = "recovery"


class RetryBudget:
    """A tenth of the requests may be re-dispatched; what was not needed is saved, up to ten."""

    def __init__(self) -> None:
        self._balance = MAX_SAVED_RETRIES

    def deposit(self) -> None:
        """One request was taken in."""
        self._balance = min(MAX_SAVED_RETRIES, self._balance + RETRY_SHARE)

    def withdraw(self) -> bool:
        """False when it is used up."""
        if self._balance < 1.0:
            return False
        self._balance -= 1.0
        return True

    def give_back(self) -> None:
        """Withdrawn, but there was no other node to try."""
        self._balance += 1.0


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
        `is_in_order`: of a node that has left when it had nothing to do, or that takes nothing."""
        if not is_worth_a_retry(error):
            return None
        if self.has_token:
            allowed = self.recovers and self.num_recoveries < MAX_RECOVERIES
            return RetryKind.RECOVERY if allowed else None
        if self.num_redispatches >= MAX_REDISPATCHES:
            return None
        return RetryKind.REDISPATCH if is_in_order or budget.withdraw() else None

    def next_attempt(
        self, kind: RetryKind, error: ServingError, failed: Placement, now: float
    ) -> SequenceRequest:
        """The request of the next attempt. Where `error` does not say which node failed, it is
        the one that prefilled."""
        self.num_attempts += 1
        if kind is RetryKind.REDISPATCH:
            self.num_redispatches += 1
        else:
            self.num_recoveries += 1
        is_decode = failed.prefill is None or error.reason in _DECODE_REASONS
        suspect = failed.decode if is_decode or failed.prefill is None else failed.prefill
        self.suspects.add(suspect.id)
        self.avoided |= {suspect.id, failed.decode.id}
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


def is_refusal(error: ServingError) -> bool:
    """A node said that it takes nothing any more: it is about to leave."""
    return isinstance(error, NodeUnavailable) and error.reason in _REFUSALS
