"""What a measurement gives: its figures, and all that is needed to read them later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from loadtest.config import BenchConfig
    from loadtest.metadata import RunMetadata
    from loadtest.record import RequestRecord
    from loadtest.statistics import Summary


@dataclass(frozen=True, slots=True)
class Cut:
    """Requests of a measurement that was ended early, which count nowhere else."""

    num_running: int
    num_unsent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """`client_cpu` is the processor time of this process as a share of the duration. `cut` is None
    when every request has ended."""

    config: BenchConfig
    model: str
    started: datetime
    summary: Summary
    records: Sequence[RequestRecord]
    client_cpu: float
    metadata: RunMetadata
    cut: Cut | None = None
