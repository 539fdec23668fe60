"""Measurements for the tests of what is made of them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from loadtest.metadata import RunMetadata
from loadtest.record import RequestFailure, RequestRecord
from loadtest.result import BenchResult
from loadtest.statistics import summarise

if TYPE_CHECKING:
    from loadtest.config import BenchConfig

MakeResult = Callable[..., BenchResult]

METADATA = RunMetadata(
    date="2026-01-02T03:04:05+00:00",
    git_commit="0123456789ab",
    python="3.11.7",
    platform="Linux",
    cpu_model="a processor",
    num_cores=2,
    memory_bytes=1 << 30,
    packages={"baton-serve": "0.1.0"},
    gpus=(),
)


def two_answers_and_a_refusal() -> list[RequestRecord]:
    """Gaps of 100, 100, 300 ms and, from a request sent at 200 ms, of 200, 350, 450 ms."""
    common: dict[str, Any] = {"planned": 0.0, "num_input_tokens": 10, "num_output_tokens": 4}
    return [
        RequestRecord(index=0, chunk_times=[0.1, 0.2, 0.3, 0.6], counted_by="usage", **common),
        RequestRecord(
            index=1, sent=0.2, chunk_times=[0.4, 0.6, 0.95, 1.4], counted_by="usage", **common
        ),
        RequestRecord(
            index=2, planned=0.5, failure=RequestFailure("http_503 overloaded", "all full")
        ),
    ]


def made_result(
    config: BenchConfig, records: list[RequestRecord] | None = None, client_cpu: float = 0.1
) -> BenchResult:
    records = two_answers_and_a_refusal() if records is None else records
    summary = summarise(
        records, 2.0, percentiles=config.percentiles, slo_seconds=config.slo_seconds
    )
    return BenchResult(
        config=config,
        model="org/model",
        started=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        summary=summary,
        records=records,
        client_cpu=client_cpu,
        metadata=METADATA,
    )
