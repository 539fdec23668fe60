"""A node that traces leaves its marks when it ends; one that was not told to marks nothing."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from kv_transfer.trace import TRACE, VARIABLE, read_marks, trace_for

if TYPE_CHECKING:
    from pathlib import Path

PROCESS = (
    "import os; from kv_transfer.trace import TRACE, trace_for; trace_for(os.environ); "
    "TRACE.mark('s.slot', 3, 128); TRACE.mark('r.start')"
)


def test_a_process_that_traces_leaves_its_marks_as_it_ends(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", PROCESS], env={VARIABLE: str(tmp_path)}, check=True)
    [left] = tmp_path.iterdir()
    slot, start = read_marks(left)
    assert slot[:3] == ("s.slot", 3, 128)
    assert start[:3] == ("r.start", 0, 0)
    assert slot.seconds <= start.seconds


def test_who_was_not_told_to_traces_nothing() -> None:
    trace_for({VARIABLE: ""})
    assert not TRACE.is_on
