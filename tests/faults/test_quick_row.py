"""The rows of the fault matrix that run with every change. The others: `make faults`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.cluster_rows import PREFILL, running_rows
from tests.faults.kv_link import Order
from tests.faults.spoiled_bytes import Spoil

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.e2e


def test_a_lost_prefill_node_a_flipped_bit_and_a_killed_redis_cost_nobody_a_token(
    tmp_path: Path,
) -> None:
    options = ("--no-enable-prefix-caching", "--kv-load-failure-policy", "recompute")
    with running_rows(*options, "--max-num-batched-tokens", "128", folder=tmp_path) as rows:
        history = rows.lose_prefill_node("prefill.before_commit")
        rows.check(history)
        assert history.codes() == set()
        rows.check_recovered()

        rows.spoil(Order(spoil=Spoil.FLIP), PREFILL)
        with rows.load() as history:
            rows.verify_spoiled(Spoil.FLIP)
        rows.check(history)
        assert history.codes() == set()
        assert rows.counted("baton_kv_load_failures_total", reason="digest_mismatch") >= 1

        with rows.load() as history:
            history.wait_for_tokens(1)
            rows.nemesis.kill("redis")
            rows.cluster.redis.reap()
            rows.cluster.redis.start()
        rows.check(history)
        assert history.codes() == set()
        rows.check_recovered()
