"""Rows P1 to P4, P6 and P7 of the fault matrix: prefill nodes that die, stand still, come back,
are slow, or send KV that is not what was asked for. P5 is in `test_small_pools`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.e2e.cluster_process import eventually
from tests.faults.cluster_rows import DECODE, PREFILL, SIZES, Rows, running_rows
from tests.faults.kv_link import Order
from tests.faults.nemesis import NotInjected, verify
from tests.faults.spoiled_bytes import Spoil

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.faults
SUSPECT_AFTER = 3  # corrupt frames, on one decode node
REVOCATIONS = "baton_kv_revocations_total"
MAX_LOADS = 10  # in which so many meet


@pytest.mark.parametrize("place", ["prefill.after_chunk", "prefill.before_commit"])
def test_p1_a_prefill_node_dies_before_its_commit(rows: Rows, policy: str, place: str) -> None:
    history = rows.lose_prefill_node(place)
    rows.check(history)
    assert policy == "fail" or not history.codes()
    rows.check_recovered()


def test_p2_a_prefill_node_dies_after_its_commit_and_nobody_notices(rows: Rows) -> None:
    history = rows.lose_prefill_node("prefill.after_commit", count=1)
    rows.check(history)
    assert history.codes() == set()
    rows.check_recovered()


def test_p3_a_prefill_node_stands_still_in_a_transfer_and_wakes_when_it_was_given_up(
    rows: Rows, policy: str
) -> None:
    cut = rows.counted(REVOCATIONS)
    rows.shoot("prefill.after_frame")
    with rows.load() as history:
        name = rows.nemesis.who_stopped(PREFILL)
        pid = rows.cluster.child(name)
    verify(lambda: rows.counted(REVOCATIONS) > cut, "nobody has given it up")
    rows.check(history)
    assert policy == "fail" or not history.codes()
    with rows.load(count=3) as meanwhile:  # its blocks on the decode node are somebody else's
        pass
    rows.check(meanwhile)
    with rows.load() as after:
        rows.nemesis.resume(pid)
    rows.check(after)
    rows.check_recovered()


def test_p4_a_slow_prefill_node_loses_nothing(rows: Rows) -> None:
    rows.spoil(Order(spoil=Spoil.DELAY, shots=1000, seconds=0.2), PREFILL[:1])
    with rows.load() as history:
        rows.verify_spoiled(Spoil.DELAY, 2)
    rows.check(history)
    assert history.codes() == set()
    rows.check_recovered()


def test_p6_a_prefill_node_that_comes_back_to_its_address_is_another(rows: Rows) -> None:
    before = rows.cluster.nodes()["prefill-0"]
    with rows.load() as history:
        history.wait_for_tokens(1)
        rows.nemesis.kill("prefill-0")
    rows.check(history)
    eventually(rows.cluster.is_whole, 60)
    after = rows.cluster.nodes()["prefill-0"]
    assert after["grpc_address"] == before["grpc_address"]
    assert after["incarnation"] != before["incarnation"]
    rows.check_recovered()


@pytest.mark.parametrize("spoil", [Spoil.FLIP, Spoil.SWAP, Spoil.STALE, Spoil.NAN])
def test_p7_corrupt_kv_is_never_read_and_its_sender_is_named(
    rows: Rows, policy: str, spoil: Spoil
) -> None:
    failures, (guilty, innocent) = "baton_kv_load_failures_total", PREFILL
    before = rows.counted(failures, reason="digest_mismatch", policy=policy)
    spoilt, others = sum(corrupt_frames(rows, guilty)), corrupt_frames(rows, innocent)
    for _ in range(MAX_LOADS):  # what follows a corrupt frame is not looked at, wherever it goes
        rows.spoil(Order(spoil=spoil, shots=SUSPECT_AFTER), [guilty])
        with rows.load() as history:
            rows.verify_spoiled(spoil)
        rows.check(history)
        assert policy == "fail" or not history.codes()
        if max(corrupt_frames(rows, guilty)) >= SUSPECT_AFTER:
            break
    assert rows.counted(failures, reason="digest_mismatch", policy=policy) > before
    counts = corrupt_frames(rows, guilty)
    assert sum(counts) > spoilt
    suspects = rows.counted("baton_kv_suspect_peer", peer=guilty)
    assert suspects == sum(count >= SUSPECT_AFTER for count in counts) > 0
    assert corrupt_frames(rows, innocent) == others
    rows.check_recovered()


def corrupt_frames(rows: Rows, sender: str) -> list[float]:
    """As each decode node has counted those of this one."""
    name = "baton_kv_corrupt_frames_total"
    return [rows.counted(name, [node], peer=sender) for node in DECODE]


def test_an_order_that_no_frame_meets_is_a_miss_that_shows(plain_rows: Rows) -> None:
    plain_rows.spoil(Order(spoil=Spoil.FLIP, skip=1_000_000))
    with plain_rows.load() as history:
        pass
    plain_rows.check(history)
    with pytest.raises(NotInjected):
        plain_rows.verify_spoiled(Spoil.FLIP)
    plain_rows.heal()


def test_without_the_digests_oracle_and_witnesses_see_what_is_wrong(tmp_path: Path) -> None:
    """The control of P7, K4 and of both of them: what digests keep out does harm."""
    blind = {name: {"BATON_TEST_BLIND": "1"} for name in DECODE}
    options = ("--no-enable-prefix-caching", "--max-num-batched-tokens", "128")
    with running_rows(*options, folder=tmp_path, sizes=SIZES, node_env=blind) as rows:
        rows.spoil(Order(spoil=Spoil.STALE, shots=1000))
        with rows.load() as history:
            rows.verify_spoiled(Spoil.STALE, 2)
        with pytest.raises(AssertionError, match="is not the oracle's"):
            rows.check(history)
        objections = [e.detail for e in history.events if e.kind == "contradiction"]
        assert any("I3" in objection for objection in objections)


def test_a_node_that_was_not_killed_or_stopped_is_a_miss_that_shows(plain_rows: Rows) -> None:
    with pytest.raises(NotInjected):
        plain_rows.nemesis.resume(plain_rows.cluster.child("prefill-0"))
    assert plain_rows.nemesis.gone(plain_rows.cluster.pids().values()) == []
    with pytest.raises(NotInjected):
        verify(lambda: os.getpid() == 0, "nothing was done")
