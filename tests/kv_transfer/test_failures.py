"""Each cause of a failed hand-off is one typed error and one metric label."""

from __future__ import annotations

import pytest

from cluster.errors import (
    DeadlineExceeded,
    HandshakeMismatch,
    LeaseExpired,
    TransferError,
    TransferFailed,
)
from kv_transfer.failures import FailureReason, failure, failure_label


@pytest.mark.parametrize("reason", list(FailureReason))
def test_every_reason_makes_a_retryable_error_that_names_it(reason: FailureReason) -> None:
    error = failure(reason)
    assert (error.reason, error.retryable) == (reason.value, True)
    assert error.message
    assert failure_label(error) == reason.value
    assert (error.retry_after_seconds is not None) is isinstance(error, TransferError)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (FailureReason.LEASE_EXPIRED, LeaseExpired),
        (FailureReason.LAYOUT_MISMATCH, HandshakeMismatch),
        (FailureReason.DEADLINE, DeadlineExceeded),
        (FailureReason.DIGEST_MISMATCH, TransferFailed),
    ],
)
def test_a_reason_has_the_class_that_its_edge_translates(
    reason: FailureReason, expected: type[Exception]
) -> None:
    assert isinstance(failure(reason), expected)


def test_a_peer_cannot_add_a_metric_label() -> None:
    assert failure_label(TransferFailed("x", reason="invented by a peer")) == "kv_load_failed"
