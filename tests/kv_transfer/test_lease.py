"""Leases: granted, renewed, released, expired."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.lease import LeaseTable

A, B, C = b"a", b"b", b"c"


def test_a_lease_lives_for_its_duration_and_not_longer() -> None:
    leases = LeaseTable(30.0)
    leases.grant(A, now=100.0)
    assert leases.is_live(A, 129.9)
    assert not leases.is_live(A, 130.0)


def test_a_renewal_moves_the_deadline_forward_only() -> None:
    leases = LeaseTable(30.0)
    leases.grant(A, now=0.0)
    leases.renew(A, 20.0, now=5.0)
    assert leases.remaining_seconds(A, 5.0) == 25.0
    leases.renew(A, 20.0, now=15.0)
    assert leases.remaining_seconds(A, 15.0) == 20.0


@pytest.mark.parametrize("extension", [1e9, math.inf, math.nan, -5.0])
def test_a_peer_cannot_hold_blocks_longer_than_one_lease_per_renewal(extension: float) -> None:
    leases = LeaseTable(30.0)
    leases.grant(A, now=0.0)
    leases.renew(A, extension, now=10.0)
    assert leases.remaining_seconds(A, 10.0) <= 30.0


def test_an_expired_lease_cannot_be_renewed_back_to_life() -> None:
    leases = LeaseTable(30.0)
    leases.grant(A, now=0.0)
    assert not leases.renew(A, 20.0, now=30.0)
    assert leases.expire(30.0) == [A]


def test_a_released_lease_neither_expires_nor_renews() -> None:
    leases = LeaseTable(30.0)
    leases.grant(A, now=0.0)
    leases.release(A)
    leases.release(A)
    assert not leases.renew(A, 20.0, now=1.0)
    assert leases.expire(1000.0) == []


def test_a_sweep_looks_behind_a_lease_that_is_still_live() -> None:
    leases = LeaseTable(30.0)
    for lease_id in (A, B, C):
        leases.grant(lease_id, now=0.0)
    leases.renew(A, 30.0, now=20.0)
    assert leases.expire(30.0) == [B, C]


def test_renewals_fall_due_six_times_per_lease() -> None:
    leases = LeaseTable(30.0)
    leases.grant(A, now=0.0)
    due = [now for now in range(31) if leases.due_renewals(float(now))]
    assert due == [5, 10, 15, 20, 25, 30]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["grant", "renew", "release", "expire"]),
            st.sampled_from([A, B, C]),
            st.floats(0, 40),
        ),
        max_size=40,
    )
)
def test_a_lease_is_live_exactly_until_the_deadline_a_plain_model_gives(
    events: list[tuple[str, bytes, float]],
) -> None:
    leases, deadlines, now = LeaseTable(30.0), dict[bytes, float](), 0.0
    for kind, lease_id, amount in events:
        now += amount / 4
        if kind == "grant":
            leases.grant(lease_id, now)
            deadlines[lease_id] = now + 30.0
        elif kind == "renew":
            leases.renew(lease_id, amount, now)
            if deadlines.get(lease_id, 0.0) > now:
                deadlines[lease_id] = max(deadlines[lease_id], now + min(amount, 30.0))
        elif kind == "release":
            leases.release(lease_id)
            deadlines.pop(lease_id, None)
        else:
            expired = {key for key, deadline in deadlines.items() if deadline <= now}
            assert set(leases.expire(now)) == expired
            deadlines = {key: d for key, d in deadlines.items() if key not in expired}
        assert all(leases.is_live(k, now) == (d > now) for k, d in deadlines.items())
