"""What the programs of a soak said of errors: lines of level error, tracebacks, and what is no line
of theirs at all (a crash of the interpreter, a library that writes by itself)."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

SHOWN_CHARS = 160
# Torch, as a node ends in order whose slots another has mapped, which is well.
LIBRARIES_SAY = ("Producer process has been terminated before all shared CUDA tensors released",)
FAULTS_CAUSE = (
    "has sent corrupt KV again and again",  # spoiled on its way
    "has registered; this one ends",  # stood still for too long
)


def errors_said(lines: Iterable[str]) -> Counter[str]:
    """How often each was said that no fault causes. `lines` begin with their program's name."""
    found: Counter[str] = Counter()
    for line in lines:
        name, _, said = line.partition(": ")
        role = name.rpartition("-")[0] or name
        if error := _error_of(said):
            found[f"{role}: {error}"[:SHOWN_CHARS]] += 1
    return found


def _error_of(said: str) -> str | None:
    if said.startswith("{'event'"):
        return None  # what the supervisor noted
    try:
        line = json.loads(said)
    except ValueError:
        return None if any(words in said for words in LIBRARIES_SAY) else said.strip() or None
    is_error = line["level"] in ("error", "critical") or "exception" in line
    if not is_error or any(words in line["event"] for words in FAULTS_CAUSE):
        return None
    last = line.get("exception", "").strip().rpartition("\n")[2]
    return f"{line['level']}: {line['event']} {last}".strip()
