from __future__ import annotations

from typing import Any

import pytest

from loadtest.record import RequestFailure, RequestRecord
from loadtest.statistics import (
    describe,
    is_within,
    peak_concurrency,
    peak_tokens_per_second,
    summarise,
)


def record(
    sent: float, times: list[float], num_tokens: int, *, planned: float = 0.0, **more: Any
) -> RequestRecord:
    return RequestRecord(
        index=0, planned=planned, sent=sent, chunk_times=times, num_output_tokens=num_tokens, **more
    )


def test_each_definition_on_one_request() -> None:
    one = record(1.0, [1.5, 2.0, 3.0], 5, planned=0.75, num_input_tokens=10)
    summary = summarise([one], 4.0, percentiles=[50.0], slo_seconds={})
    means = {name: found.mean for name, found in summary.latencies.items()}
    assert means == {
        "ttft": 0.5,
        "tpot": 1.5 / 4,
        "itl": 0.75,
        "e2el": 2.0,
        "ttst": 0.5,
        "ntpot": 2.0 / 5,
        "corrected_ttft": 0.75,
        "schedule_delay": 0.25,
    }
    assert summary.latencies["itl"].count == 2
    assert summary.request_throughput == 0.25
    assert summary.output_throughput == 1.25
    assert summary.total_token_throughput == 3.75
    assert summary.tokens_per_chunk == pytest.approx(5 / 3)


def test_a_request_of_one_token_has_no_tpot_and_meets_its_limit() -> None:
    one = record(0.0, [9.0], 1)
    summary = summarise([one], 9.0, percentiles=[], slo_seconds={"tpot": 0.001})
    assert summary.latencies["tpot"].count == 0
    assert summary.request_goodput == pytest.approx(1 / 9)


def test_goodput_wants_every_limit_and_attainment_counts_failures() -> None:
    fast = record(0.0, [0.1, 0.2], 2)
    slow_start = record(0.0, [0.9, 1.0], 2)
    slow_tokens = record(0.0, [0.1, 1.1], 2)
    failed = record(0.0, [], 0, failure=RequestFailure("http_503 overloaded", "full"))
    limits = {"ttft": 0.5, "tpot": 0.5}
    summary = summarise(
        [fast, slow_start, slow_tokens, failed], 2.0, percentiles=[], slo_seconds=limits
    )
    assert [is_within(r, limits) for r in (fast, slow_start, slow_tokens)] == [True, False, False]
    assert summary.request_goodput == 0.5
    assert summary.slo_attainment == 0.25
    assert (summary.completed, summary.failed) == (3, 1)
    assert summary.failures_by_class == {"http_503 overloaded": 1}


def test_a_limit_that_is_met_exactly_is_met() -> None:
    assert is_within(record(0.0, [0.5, 1.0], 2), {"e2el": 1.0})


def test_failed_requests_bring_no_tokens_and_no_latencies() -> None:
    failed = record(0.0, [1.0, 2.0], 2, failure=RequestFailure("timeout", ""))
    summary = summarise([failed], 2.0, percentiles=[99.0], slo_seconds={})
    assert summary.total_output_tokens == 0
    assert summary.latencies["ttft"].count == 0
    assert summary.latencies["ttft"].percentiles[99.0] == 0.0
    assert summary.request_goodput is None


def test_percentiles_interpolate_and_spread_is_of_the_population() -> None:
    found = describe([1.0, 2.0, 3.0, 4.0], [50.0, 90.0])
    assert found.percentiles == {50.0: 2.5, 90.0: pytest.approx(3.7)}
    assert found.std == pytest.approx(1.25**0.5)
    assert (found.min, found.max) == (1.0, 4.0)


def test_peak_throughput_is_the_best_second_with_tokens_spread_over_chunks() -> None:
    first = record(10.0, [10.1, 10.2, 11.5], 6)  # 2 tokens a chunk: 4 in second 0, 2 in second 1
    second = record(11.0, [11.9], 3)
    assert peak_tokens_per_second([first, second]) == 5.0
    assert peak_tokens_per_second([]) == 0.0


def test_peak_concurrency_does_not_count_a_request_that_ends_as_another_starts() -> None:
    assert peak_concurrency([record(0.0, [1.0], 1), record(1.0, [2.0], 1)]) == 1
    assert peak_concurrency([record(0.0, [1.5], 1), record(1.0, [2.0], 1)]) == 2
