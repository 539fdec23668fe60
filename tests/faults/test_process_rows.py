"""Rows P1 to P3, D1, D2 and C1 of the fault matrix: processes that die or stand still, and
clients that leave, on a real cluster under load."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.faults.cluster_rows import NUM_REQUESTS, NUM_TOKENS, Rows, running_rows
from tests.faults.nemesis import Nemesis

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.faults
SEED = int(os.environ.get("BATON_FAULT_SEED", "1"))
HALF = NUM_REQUESTS * NUM_TOKENS // 2  # of all tokens
POLICIES = ["fail", "recompute"]


@pytest.fixture(scope="module", params=POLICIES)
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[False, True], ids=["", "stream-recovery"])
def recovers(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def shared_rows(
    policy: str, recovers: bool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rows]:
    options = ["--stream-recovery"] if recovers else []
    shots = tmp_path_factory.mktemp("shots")
    with running_rows(policy, *options, shots=shots, seed=SEED) as running:
        yield running


@pytest.fixture
def rows(shared_rows: Rows) -> Rows:
    print(f"seed {shared_rows.seed}")
    return shared_rows


@pytest.fixture
def nemesis(rows: Rows) -> Iterator[Nemesis]:
    made = Nemesis(rows.cluster)
    yield made
    made.heal()
    print("nemesis:", made.log)
    for shot in rows.shots.iterdir():
        shot.unlink()


@pytest.mark.parametrize("place", ["prefill.after_chunk", "prefill.before_commit"])
def test_p1_a_prefill_node_dies_before_its_commit(
    rows: Rows, nemesis: Nemesis, policy: str, place: str
) -> None:
    history = rows.lose_prefill_node(nemesis, place)
    assert policy == "fail" or not history.codes()
    rows.check_recovered()


def test_p2_a_prefill_node_dies_after_its_commit_and_nobody_notices(
    rows: Rows, nemesis: Nemesis
) -> None:
    history = rows.lose_prefill_node(nemesis, "prefill.after_commit", count=1)
    assert history.codes() == set()
    rows.check_recovered()


def test_p3_a_prefill_node_stands_still_in_a_transfer_and_wakes_when_it_was_given_up(
    rows: Rows, nemesis: Nemesis, policy: str
) -> None:
    rows.shoot("prefill.after_frame")
    with rows.load() as history:
        pid = nemesis.who_stopped()
    rows.check(history)
    assert policy == "fail" or not history.codes()
    with rows.load(count=3) as meanwhile:  # its blocks on the decode node are somebody else's
        pass
    rows.check(meanwhile, count=3)
    with rows.load() as after:
        nemesis.resume(pid)
    rows.check(after)
    rows.check_recovered()


@pytest.mark.parametrize("after", [0, 1, HALF])
def test_d1_a_decode_node_is_killed_after_some_tokens(
    rows: Rows, nemesis: Nemesis, recovers: bool, after: int
) -> None:
    with rows.load() as history:
        history.wait_for_tokens(after)
        nemesis.kill("decode-0")
    rows.check(history)
    assert not (recovers and history.codes())
    rows.check_recovered()


def test_d2_a_decode_node_stands_still_for_longer_than_a_lease(
    rows: Rows, nemesis: Nemesis, recovers: bool
) -> None:
    with rows.load() as history:
        history.wait_for_tokens(HALF)
        pid = nemesis.stop("decode-0")
    rows.check(history)
    assert not (recovers and history.codes())
    with rows.load() as after:
        nemesis.resume(pid)
    rows.check(after)
    rows.check_recovered()


def test_c1_clients_leave_in_any_phase(rows: Rows) -> None:
    with rows.load(leaves_after=[0, 1, NUM_TOKENS // 2]) as history:
        pass
    assert history.kinds().count("left") == 3
    rows.check(history)
    assert history.codes() == set()
    rows.check_recovered()
