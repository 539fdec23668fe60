"""Why KV was not handed over: one reason per cause, used as metric label and error reason."""

from __future__ import annotations

from enum import StrEnum

from cluster.errors import (
    DeadlineExceeded,
    HandshakeMismatch,
    LeaseExpired,
    ServingError,
    TransferError,
    TransferFailed,
)

RETRY_SECONDS = 1.0  # a broken pair is noticed, cut and connected anew in less


class FailureReason(StrEnum):
    SENDER_LOST = "prefill_lost"
    RECEIVER_LOST = "decode_lost"
    LINK_LOST = "link_lost"
    COMMIT_UNKNOWN = "commit_unknown"  # the receiver was lost between Commit and its answer
    DIGEST_MISMATCH = "digest_mismatch"
    FRAME_MALFORMED = "frame_malformed"
    FRAME_UNEXPECTED = "frame_unexpected"  # well formed, but not what the ticket allows
    FRAME_LOST = "frame_lost"
    INCOMPLETE = "incomplete"  # committed, but blocks are missing
    SENDER_REPLACED = "prefill_replaced"  # another process has the name of this one
    TICKET_INVALID = "ticket_invalid"
    LEASE_EXPIRED = "lease_expired"
    TRANSFER_TIMEOUT = "transfer_timeout"  # both ends live, and nothing moves
    DEADLINE = "deadline_exceeded"
    LAYOUT_MISMATCH = "layout_mismatch"
    TRANSPORT_REFUSED = "transport_refused"
    FRAME_DUPLICATE = "frame_duplicate"
    ALREADY_STARTED = "already_started"  # an earlier attempt of the same sequence runs
    SUPERSEDED = "superseded"  # a newer attempt of the same sequence took over
    WITHDRAWN = "withdrawn"  # the sender needs it no more: no failure
    ABORTED = "aborted"
    INTERNAL = "internal"
    UNKNOWN = "unknown"  # nobody foresaw it: a failure like any other


_MESSAGES = {
    FailureReason.SENDER_LOST: "The prefill node was lost before the KV was complete.",
    FailureReason.RECEIVER_LOST: "The decode node was lost before it took the KV.",
    FailureReason.LINK_LOST: "The data connection between the nodes broke.",
    FailureReason.COMMIT_UNKNOWN: "The decode node was lost before it said whether it started.",
    FailureReason.DIGEST_MISMATCH: "KV arrived that differs from what was sent.",
    FailureReason.FRAME_MALFORMED: "A KV frame could not be read.",
    FailureReason.FRAME_UNEXPECTED: "A KV frame arrived that its ticket does not allow.",
    FailureReason.FRAME_LOST: "A KV frame did not arrive.",
    FailureReason.INCOMPLETE: "The transfer was committed before all of its KV was sent.",
    FailureReason.SENDER_REPLACED: "Another process has taken the prefill node's name.",
    FailureReason.TICKET_INVALID: "The ticket of the transfer is not valid.",
    FailureReason.LEASE_EXPIRED: "The lease on the blocks in transfer was not renewed.",
    FailureReason.TRANSFER_TIMEOUT: "The KV stopped moving between the nodes.",
    FailureReason.DEADLINE: "The deadline of the request passed.",
    FailureReason.LAYOUT_MISMATCH: "The nodes differ in model, KV layout or protocol version.",
    FailureReason.TRANSPORT_REFUSED: "The nodes have no connection of the required kind.",
    FailureReason.ALREADY_STARTED: "The sequence runs on the decode node already.",
    FailureReason.SUPERSEDED: "A newer attempt took over.",
    FailureReason.ABORTED: "The transfer was aborted.",
    FailureReason.INTERNAL: "The transfer failed inside the node.",
    FailureReason.UNKNOWN: "The transfer failed in a way that nobody foresaw.",
}

_REASONS = frozenset(reason.value for reason in FailureReason)

_CLASSES: dict[FailureReason, type[ServingError]] = {
    FailureReason.DEADLINE: DeadlineExceeded,
    FailureReason.LEASE_EXPIRED: LeaseExpired,
    FailureReason.LAYOUT_MISMATCH: HandshakeMismatch,
}


def failure(reason: FailureReason) -> ServingError:
    """The typed error of a cause."""
    cls = _CLASSES.get(reason, TransferFailed)
    return cls(
        _MESSAGES.get(reason, _MESSAGES[FailureReason.ABORTED]),
        reason=reason.value,
        retry_after_seconds=RETRY_SECONDS if issubclass(cls, TransferError) else None,
    )


def failure_label(error: ServingError) -> str:
    """A metric label: one of the reasons above, else the error's code. Peers cannot add any."""
    return error.reason if error.reason in _REASONS else error.code
