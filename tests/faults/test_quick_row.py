"""The one row of the fault matrix that runs with every change. The others: `make faults`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.cluster_rows import running_rows
from tests.faults.nemesis import Nemesis

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.e2e


def test_a_prefill_node_that_dies_before_its_commit_costs_nobody_a_token(tmp_path: Path) -> None:
    with running_rows("recompute", shots=tmp_path, seed=3) as rows:
        history = rows.lose_prefill_node(Nemesis(rows.cluster), "prefill.before_commit")
        assert history.codes() == set()
        rows.check_recovered()
