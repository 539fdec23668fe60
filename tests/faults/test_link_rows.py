"""Rows K1 to K4, K7 and K8 of the fault matrix: what a bad link does to KV on its way. K5 is in
`test_redis_rows`, K6 in `test_rank_rows`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.cluster_rows import DECODE, LEASE_SECONDS, POLICIES, PREFILL, running_rows
from tests.faults.kv_link import Order
from tests.faults.leaks import held_by
from tests.faults.nemesis import verify
from tests.faults.proxy import Faults
from tests.faults.spoiled_bytes import Spoil

if TYPE_CHECKING:
    from pathlib import Path

    from tests.faults.cluster_rows import Rows

pytestmark = pytest.mark.faults
MIB = 1 << 20
CUTS = (Spoil.CUT_BEFORE_HEADER, Spoil.CUT_BEFORE_PAYLOAD, Spoil.CUT_AFTER_PAYLOAD)


@pytest.mark.parametrize("skip", [0, 3], ids=["first-frame", "later-frame"])
@pytest.mark.parametrize("cut", CUTS)
def test_k1_the_link_is_cut_around_a_frame(rows: Rows, policy: str, cut: Spoil, skip: int) -> None:
    rows.spoil(Order(spoil=cut, skip=skip))
    with rows.load() as history:
        rows.verify_spoiled(cut)
    rows.check(history)
    assert policy == "fail" or not history.codes()
    rows.check_recovered()


@pytest.mark.parametrize("after", [0, 300, 1000])
def test_k1_the_control_stream_is_reset_after_some_bytes(
    rows: Rows, policy: str, after: int
) -> None:
    """It carries Reserve, Commit and, to gateways, the tokens: both kinds of peer lose the node."""
    proxy = rows.cluster.node_proxies["decode-0"]
    passed = proxy.counters["bytes_up"]
    with rows.load() as history:
        verify(lambda: proxy.counters["bytes_up"] > passed + after, "nothing passed")
        proxy.faults_up = Faults(reset_after=0)
        verify(lambda: proxy.counters["reset"] > 0, "no connection was reset")
        proxy.heal()
        rows.nemesis.note(f"decode-0: {proxy.counters['reset']} connections reset")
    proxy.counters["reset"] = 0
    rows.check(history)
    assert policy == "fail" or not history.codes()
    rows.check_recovered()


def test_k2_a_slow_link_holds_up_and_takes_no_memory(rows: Rows) -> None:
    rows.spoil(Order(spoil=Spoil.RATE, shots=1000, bytes_per_second=0.5 * MIB))
    before = {name: held_by(rows.cluster.child(name)) for name in (*PREFILL, *DECODE)}
    with rows.load() as history:
        rows.verify_spoiled(Spoil.RATE, 4)
        grown = max(
            held_by(rows.cluster.child(name)).resident_bytes - before[name].resident_bytes
            for name in before
        )
    rows.check(history)
    assert history.codes() == set()
    assert grown < 64 * MIB
    rows.check_recovered()


@pytest.mark.parametrize("seconds", [0.0, 1.0, LEASE_SECONDS + 1.0])
def test_k3_a_frame_that_comes_twice_is_taken_once(rows: Rows, seconds: float) -> None:
    """At once, after a second, and when its transfer has long ended and its blocks are others'."""
    dropped = rows.counted("baton_kv_frames_dropped_total")
    spoil = Spoil.LATE if seconds else Spoil.DUPLICATE
    rows.spoil(Order(spoil=spoil, shots=2, seconds=seconds))
    with rows.load() as history:
        rows.verify_spoiled(spoil, 2)
    rows.check(history)
    with rows.load() as meanwhile:
        verify(
            lambda: rows.counted("baton_kv_frames_dropped_total") > dropped,
            "no second frame was counted",
        )
    rows.check(meanwhile)
    rows.check_recovered()


def test_k3_frames_that_change_places_are_taken_or_refused_but_not_mixed(
    rows: Rows, policy: str
) -> None:
    rows.spoil(Order(spoil=Spoil.REORDER, shots=1))
    with rows.load() as history:
        rows.verify_spoiled(Spoil.REORDER)
    rows.check(history)
    assert policy == "fail" or not history.codes()
    rows.check_recovered()


@pytest.mark.parametrize(
    "spoil", [Spoil.FLIP_HEADER, Spoil.TRUNCATE, Spoil.TRUNCATE_HEADER, Spoil.LIE]
)
def test_k4_a_frame_that_lies_about_itself_is_refused(
    rows: Rows, policy: str, spoil: Spoil
) -> None:
    before = {name: held_by(rows.cluster.child(name)) for name in DECODE}
    pids = {name: rows.cluster.child(name) for name in (*PREFILL, *DECODE)}
    rows.spoil(Order(spoil=spoil))
    with rows.load() as history:
        rows.verify_spoiled(spoil)
    rows.check(history)
    assert policy == "fail" or not history.codes()
    for name in DECODE:
        now = held_by(rows.cluster.child(name))
        assert now.resident_bytes - before[name].resident_bytes < 64 * MIB
    assert pids == {name: rows.cluster.child(name) for name in pids}
    rows.check_recovered()


def test_k7_frames_that_never_come_are_given_up_in_time(rows: Rows, policy: str) -> None:
    """The link stands, no frame arrives on it: no FIN, no RST, no error, and no gap either."""
    timeouts = {"name": "baton_kv_load_failures_total", "reason": "transfer_timeout"}
    before = rows.counted(nodes=DECODE, **timeouts)
    rows.spoil(Order(spoil=Spoil.BLACKHOLE, shots=1000))
    with rows.load() as history:
        rows.verify_spoiled(Spoil.BLACKHOLE, len(PREFILL))  # what is behind them waits for them
    rows.check(history)
    assert rows.counted(nodes=DECODE, **timeouts) > before
    assert policy == "fail" or not history.codes()
    rows.check_recovered()


def test_k7_a_link_that_swallows_everything_is_left_before_its_transfers_are_overdue(
    tmp_path: Path,
) -> None:
    """Their sender knows that all of it has left, the control stream works."""
    options = ("--no-enable-prefix-caching", "--max-num-batched-tokens", "128")
    with running_rows(*options, "--stall-seconds", "120", folder=tmp_path) as rows:
        for policy in POLICIES:
            rows.set_policy(policy)
            lost = rows.counted("baton_kv_load_failures_total", reason="link_lost")
            rows.spoil(Order(spoil=Spoil.SWALLOW))
            with rows.load() as history:
                rows.verify_spoiled(Spoil.SWALLOW)
            rows.check(history)
            assert policy == "fail" or not history.codes()
            assert rows.counted("baton_kv_load_failures_total", reason="link_lost") > lost
            assert not rows.counted("baton_kv_load_failures_total", reason="transfer_timeout")
            rows.check_recovered()


@pytest.mark.parametrize("way", ["up", "down", "both"])
def test_k7_and_g6_a_decode_node_that_nobody_can_hear_is_left(
    rows: Rows, policy: str, way: str
) -> None:
    """Its control plane is cut off in one way or both, from gateway and prefill nodes alike."""
    proxy = rows.cluster.node_proxies["decode-0"]
    held = proxy.counters["blackholed"]
    with rows.load() as history:
        history.wait_for_tokens(1)
        if way != "down":
            proxy.faults_up = Faults(is_blackholed=True)
        if way != "up":
            proxy.faults_down = Faults(is_blackholed=True)
        rows.nemesis.note(f"decode-0 blackholed: {way}")
    assert proxy.counters["blackholed"] > held, "nothing was held: the row proves nothing"
    rows.check(history)
    assert policy == "fail" or not history.codes()
    proxy.heal()
    rows.check_recovered()


def test_k8_prompts_leave_a_pair_whose_link_breaks_each_time_and_come_back(rows: Rows) -> None:
    """One by one they would all go there: its nodes are idle, and otherwise well."""
    one = rows.asks[:1]

    def is_cut() -> bool:
        before = rows.num_spoiled()
        with rows.load(one) as history:
            pass
        rows.check(history)
        return rows.num_spoiled() > before

    def is_held_back() -> bool:
        held = rows.cluster.nodes()["prefill-0"]["pairs_held_back"]
        return "decode-0" in {pair["decode_node"] for pair in held}

    rows.spoil(Order(spoil=Spoil.CUT_BEFORE_HEADER, shots=1000), PREFILL[:1])
    verify(lambda: is_cut() and is_held_back(), "no pair was held back")
    verify(lambda: not is_cut(), "all prompts go where the link breaks")
    rows.heal()
    verify(lambda: not is_cut() and not is_held_back(), "no prompt has come back")
    rows.check_recovered()
