"""The life of one sequence as the gateway sees it: which token reaches the client, in what order,
and who must be told when it ends.

    SUBMITTED   nothing seen yet
    PREFILLED   the first token came, from the prefill node, and was delivered
    STARTED     the decode node has the KV and runs the sequence
    FINISHED    exactly one ending was delivered, or the client wants none

The prefill node gives the first token, the decode node all others; their streams race, so what
the decode node sends is held until the first token is there. Without a prefill node
(`has_prefill` false) the decode node gives every token.

Where the policy is to recompute, a decode node whose hand-off failed goes on by itself and says
`recomputed`: every token comes from there, and the first one, if the client has it already, must
be the same; else the sequence fails, as its hand-off has. A failure of the hand-off that the
prefill node reports is then the decode node's to judge; and after the first token it is in any
case, as the decode node may have been told to start.

Losing the prefill node matters only until the decode node says `started`. Before the first
token nothing can be saved; after it the decode node is asked (`AskDecode`) and has
`ORPHAN_SECONDS` to say that it runs the sequence, or why not. One that recomputes is asked before
the first token, too; one that runs the sequence by a hand-off then has all tokens but that one,
which went with the prefill node: nothing can be saved.

A node that says of a running sequence that it was cancelled had no such order from here, or the
sequence would have ended: the decode node gave it up, on its way out or cut off from this gateway.
The client asked for no cancel, so it is a lost node, and worth another attempt.

Pure: time is an argument, answers are instructions. `Deliver` holds what the client gets; a
`Deliver` whose delta has `finish_reason` or `error` is the ending and the last.
"""

from __future__ import annotations

import math
from enum import Enum, auto

from cluster.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    NodeLost,
    NodeUnavailable,
    ServingError,
    TransferError,
    TransferFailed,
)
from cluster.request import FinishReason, TokenDelta
from gateway.sequence_instructions import (
    AskDecode,
    CancelDecode,
    CancelPrefill,
    Deliver,
    Instructions,
    Patience,
)

ORPHAN_SECONDS = 3.0
_RETRY_SECONDS = 1.0


class SequenceState(Enum):
    SUBMITTED = auto()
    PREFILLED = auto()
    STARTED = auto()
    FINISHED = auto()


class SequenceMachine:
    """See the module. `deadline` is an instant of the clock whose readings are passed in."""

    __slots__ = (
        "_deadline",
        "_first_token_id",
        "_first_token_seen",
        "_handed_off",
        "_has_prefill",
        "_held",
        "_is_finished",
        "_is_recomputed",
        "_is_started",
        "_may_recompute",
        "_orphan_deadline",
        "_patience",
        "_prefill_error",
        "_progress_at",
        "_sequence_id",
    )

    def __init__(
        self,
        sequence_id: str,
        *,
        has_prefill: bool,
        now: float,
        deadline: float | None = None,
        patience: Patience | None = None,
        may_recompute: bool = False,
    ) -> None:
        self._sequence_id = sequence_id
        self._has_prefill = has_prefill
        self._deadline = math.inf if deadline is None else deadline
        self._patience = patience or Patience()
        self._held: list[TokenDelta] = []
        self._may_recompute = may_recompute
        self._is_recomputed = False
        self._prefill_error: ServingError | None = None
        self._first_token_id: int | None = None
        self._first_token_seen = False
        self._handed_off = False
        self._is_started = False
        self._is_finished = False
        self._orphan_deadline = math.inf
        self._progress_at = now

    @property
    def state(self) -> SequenceState:
        if self._is_finished:
            return SequenceState.FINISHED
        if self._is_started:
            return SequenceState.STARTED
        return SequenceState.PREFILLED if self._first_token_seen else SequenceState.SUBMITTED

    @property
    def is_started(self) -> bool:
        """The decode node has it."""
        return self._is_started

    @property
    def is_recomputed(self) -> bool:
        """The hand-off failed, and the decode node goes on without."""
        return self._is_recomputed

    @property
    def is_finished(self) -> bool:
        return self._is_finished

    # ---- from the prefill node -----------------------------------------------------------

    def prefill_delta(self, delta: TokenDelta, now: float) -> Instructions:
        if self._is_finished or not self._has_prefill:
            return []
        self._handed_off = self._handed_off or delta.handed_off
        if delta.error is not None:
            if self._is_recomputed or (self._is_started and self._first_token_seen):
                return []  # the decode node runs it, whatever becomes of the prefill node
            return self._prefill_failed(_unless_cancelled(delta.error), now)
        if not delta.token_ids:
            return self._ended(delta) if delta.finish_reason is not None else []
        if self._is_recomputed and self._first_token_seen:
            return []  # it came from the decode node before
        if self._first_token_seen or len(delta.token_ids) != 1:
            return self.fail(InternalError("The prefill node sent more than the first token."))
        return self._take_first_token(delta, now)

    def _prefill_failed(self, error: ServingError, now: float) -> Instructions:
        """Of a hand-off that failed after the first token it alone does not know the end: its
        commit may have arrived, and the decode node be running."""
        may_run = self._may_recompute or self._first_token_seen
        if may_run and isinstance(error, TransferError | NodeUnavailable):
            return self._ask_decode(error, now)
        return self.fail(error)

    def _take_first_token(self, delta: TokenDelta, now: float) -> Instructions:
        if delta.finish_reason is not None:
            # Nothing was handed off; a decode node that says otherwise must stop.
            return self._ended(delta) + ([CancelDecode()] if self._is_started else [])
        self._first_token_seen = True
        self._first_token_id = delta.token_ids[0]
        self._progress_at = now
        instructions: Instructions = [Deliver(delta)]
        held, self._held = self._held, []
        for later in held:
            instructions += self._take_decoded(later, now)
        return instructions

    def prefill_lost(self, now: float) -> Instructions:
        if self._is_finished or not self._has_prefill:
            return []
        self._handed_off = True  # nothing is left there to cancel
        if self._is_recomputed or (self._is_started and self._first_token_seen):
            return []
        may_be_saved = self._first_token_seen or (self._may_recompute and not self._is_started)
        return self._ask_decode(None, now) if may_be_saved else self.fail(_lost("prefill"))

    def _ask_decode(self, error: ServingError | None, now: float) -> Instructions:
        """It runs the sequence, will compute what is missing, or that is the end: in `error`, if
        the prefill node told one."""
        self._prefill_error = error
        self._handed_off = True
        self._orphan_deadline = now + ORPHAN_SECONDS
        return [AskDecode()]

    # ---- from the decode node ------------------------------------------------------------

    def decode_delta(self, delta: TokenDelta, now: float) -> Instructions:
        if self._is_finished:
            return []
        if delta.started or delta.token_ids:
            self._is_started = True
            self._orphan_deadline = math.inf
            self._prefill_error = None  # whatever ends it now is the decode node's
        if delta.error is not None:
            return self.fail(self._prefill_error or _unless_cancelled(delta.error))
        self._is_recomputed = self._is_recomputed or delta.recomputed
        if self._is_recomputed:
            return self._take_recomputed(delta, now)
        if self._has_prefill and not self._first_token_seen:
            return self._hold(delta)
        return self._take_decoded(delta, now)

    def _hold(self, delta: TokenDelta) -> Instructions:
        """Until the first token comes, if it still can."""
        if self._is_started and self._handed_off:
            return self.fail(_lost("prefill"))
        self._held.append(delta)
        return []

    def _take_recomputed(self, delta: TokenDelta, now: float) -> Instructions:
        """From a decode node that gives every token: its first may be known already."""
        if not self._first_token_seen:
            self._first_token_seen = bool(delta.token_ids)
        elif self._first_token_id is not None and delta.token_ids:
            if delta.token_ids[0] != self._first_token_id:
                return self.fail(
                    TransferFailed(
                        "The recomputed sequence begins otherwise.",
                        reason="recompute_differs",
                        retry_after_seconds=_RETRY_SECONDS,
                    )
                )
            self._first_token_id = None
            delta = delta._replace(token_ids=delta.token_ids[1:], logprobs=delta.logprobs[1:])
        return self._take_decoded(delta, now)

    def _take_decoded(self, delta: TokenDelta, now: float) -> Instructions:
        if self._is_finished:
            return []
        self._progress_at = now
        if delta.finish_reason is not None:
            return self._ended(delta)
        if not delta.token_ids and delta.num_cached_tokens is None:
            return []
        return [Deliver(delta)]

    def decode_lost(self, now: float) -> Instructions:
        return [] if self._is_finished else self.fail(_lost("decode"))

    # ---- from this side ------------------------------------------------------------------

    def cancel(self) -> Instructions:
        """The client is gone, or has all it wants: nothing more is delivered."""
        if self._is_finished:
            return []
        self._is_finished = True
        return self._cancel_nodes()

    def fail(self, error: ServingError) -> Instructions:
        """End with `error`, whoever it comes from."""
        if self._is_finished:
            return []
        self._is_finished = True
        ending = TokenDelta(sequence_id=self._sequence_id, error=error)
        return [Deliver(ending), *self._cancel_nodes()]

    def tick(self, now: float) -> Instructions:
        """To be called a few times a second; ends what has run out of time."""
        if self._is_finished:
            return []
        if now >= self._deadline:
            return self.fail(DeadlineExceeded("The request's deadline passed."))
        if now >= self._orphan_deadline:
            return self.fail(self._prefill_error or _lost("prefill"))
        has_token = self._first_token_seen or (self._is_started and not self._has_prefill)
        patience = self._patience.between_tokens if has_token else self._patience.first_token
        if now - self._progress_at >= patience:
            return self.fail(DeadlineExceeded("The nodes took too long to produce a token."))
        return []

    # ---- endings -------------------------------------------------------------------------

    def _ended(self, delta: TokenDelta) -> Instructions:
        if delta.finish_reason is FinishReason.ABORT:
            return self.fail(_lost("decode"))
        self._is_finished = True
        return [Deliver(delta)]

    def _cancel_nodes(self) -> Instructions:
        instructions: Instructions = [CancelDecode()]
        if self._has_prefill and not self._handed_off:
            instructions.insert(0, CancelPrefill())
        return instructions


def _unless_cancelled(error: ServingError) -> ServingError:
    return _lost("decode") if isinstance(error, Cancelled) else error


def _lost(role: str) -> NodeLost:
    return NodeLost(
        f"The {role} node that worked on this request was lost.",
        reason=f"{role}_lost",
        retry_after_seconds=_RETRY_SECONDS,
    )
