"""Row R7 of the fault matrix: clocks that differ by hours, and step while requests run.

Needs libfaketime (`apt-get install libfaketime`), or its path in BATON_LIBFAKETIME.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.faults.cluster_rows import running_rows
from tests.faults.nemesis import verify

if TYPE_CHECKING:
    from tests.faults.cluster import FaultCluster

pytestmark = pytest.mark.faults
HOUR_SECONDS = 3600.0


def libfaketime() -> str | None:
    named = os.environ.get("BATON_LIBFAKETIME")
    if named:
        return named
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    return str(found[0]) if found else None


def offset_of(cluster: FaultCluster, name: str) -> float:
    """Seconds by which the clock of a node is ahead, by what it said last."""
    for line in reversed(cluster.lines):
        program, _, said = line.partition(": ")
        if program == name and said.startswith("{") and '"ts"' in said:
            told = datetime.fromisoformat(json.loads(said)["ts"])
            return (told - datetime.now(UTC)).total_seconds()
    return 0.0


@pytest.mark.skipif(libfaketime() is None, reason="needs libfaketime: apt-get install libfaketime")
def test_r7_clocks_that_differ_and_step_change_nothing(tmp_path: Path) -> None:
    clocks = {name: tmp_path / f"clock-{name}" for name in ("prefill-0", "decode-0")}
    clocks["prefill-0"].write_text("+1h")
    clocks["decode-0"].write_text("-1h")
    env = {
        name: {
            "LD_PRELOAD": libfaketime() or "",
            "FAKETIME_TIMESTAMP_FILE": str(path),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        for name, path in clocks.items()
    }
    with running_rows(folder=tmp_path, node_env=env) as rows:
        verify(lambda: offset_of(rows.cluster, "prefill-0") > HOUR_SECONDS / 2, "no clock ahead")
        verify(lambda: offset_of(rows.cluster, "decode-0") < -HOUR_SECONDS / 2, "no clock behind")
        with rows.load() as history:
            history.wait_for_tokens(1)
            clocks["prefill-0"].write_text("-1h")
            clocks["decode-0"].write_text("+1h")
        rows.check(history)
        assert history.codes() == set()
        rows.check_recovered()
