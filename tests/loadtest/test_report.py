from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from cluster.errors import ConfigError
from loadtest.metadata import RunMetadata
from loadtest.record import RequestFailure, RequestRecord
from loadtest.report import BenchResult, render_notes, render_table, result_path, save, to_json
from loadtest.statistics import summarise

if TYPE_CHECKING:
    from pathlib import Path

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

TABLE = """\
============ Serving Benchmark Result ============
Successful requests:                     2         
Failed requests:                         1         
Maximum request concurrency:             4         
Request rate configured (RPS):           2.00      
Benchmark duration (s):                  2.00      
Total input tokens:                      20        
Total generated tokens:                  8         
Request throughput (req/s):              1.00      
Request goodput (req/s):                 0.50      
Output token throughput (tok/s):         4.00      
Peak output token throughput (tok/s):    7.00      
Peak concurrent requests:                2.00      
Total token throughput (tok/s):          14.00     
---------------Time to First Token----------------
Mean TTFT (ms):                          150.00    
Median TTFT (ms):                        150.00    
P90 TTFT (ms):                           190.00    
P99 TTFT (ms):                           199.00    
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          250.00    
Median TPOT (ms):                        250.00    
P90 TPOT (ms):                           316.67    
P99 TPOT (ms):                           331.67    
---------------Inter-token Latency----------------
Mean ITL (ms):                           250.00    
Median ITL (ms):                         250.00    
P90 ITL (ms):                            400.00    
P99 ITL (ms):                            445.00    
----------------End-to-end Latency----------------
Mean E2EL (ms):                          900.00    
Median E2EL (ms):                        900.00    
P90 E2EL (ms):                           1140.00   
P99 E2EL (ms):                           1194.00   
==================================================
"""


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


@pytest.fixture
def make_result(bench_config: Any) -> MakeResult:
    def make(
        records: list[RequestRecord] | None = None, client_cpu: float = 0.1, **options: Any
    ) -> BenchResult:
        records = two_answers_and_a_refusal() if records is None else records
        config = bench_config(**options)
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

    return make


def test_the_table_is_that_of_vllm_bench_serve(make_result: MakeResult) -> None:
    result = make_result(
        max_concurrency=4,
        request_rate=2.0,
        goodput=("ttft:150",),
        percentile_metrics="ttft,tpot,itl,e2el",
    )
    assert render_table(result) + "\n" == TABLE


def test_rows_without_a_setting_are_left_out(make_result: MakeResult) -> None:
    table = render_table(make_result(percentile_metrics="itl", metric_percentiles="99.9"))
    for absent in ("concurrency:", "configured", "goodput", "TTFT", "TPOT", "E2EL", "P90"):
        assert absent not in table
    assert "P99.9 ITL (ms):" in table


def test_notes_name_error_classes_and_messages(make_result: MakeResult) -> None:
    notes = render_notes(make_result())
    assert "Errors: 1 x http_503 overloaded" in notes
    assert "all full" in notes


def test_a_clean_run_has_no_notes(make_result: MakeResult) -> None:
    assert render_notes(make_result(two_answers_and_a_refusal()[:2])) == ""


def test_notes_warn_of_what_makes_a_result_doubtful(make_result: MakeResult) -> None:
    records = two_answers_and_a_refusal()[:2]
    records[0].counted_by = "chunks"
    records[1].num_cached_tokens = 5
    notes = render_notes(make_result(records, client_cpu=0.97, request_rate=5.0))
    assert "1 answers had no usage" in notes
    assert "used 97% of a core" in notes
    assert "p99 of requests left 198 ms after" in notes
    assert "Cached prompt tokens: 5 (25.0%)" in notes


def test_the_json_has_the_keys_that_scripts_for_vllm_read(make_result: MakeResult) -> None:
    document = json.loads(json.dumps(to_json(make_result(goodput=("e2el:9000",)))))
    expected = {
        "backend": "openai",
        "model_id": "org/model",
        "num_prompts": 3,
        "request_rate": "inf",
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 20,
        "total_output_tokens": 8,
        "request_throughput": 1.0,
        "request_goodput": 1.0,
        "output_throughput": 4.0,
        "total_token_throughput": 14.0,
        "max_output_tokens_per_s": 7.0,
        "max_concurrent_requests": 2,
        "errors_by_class": {"http_503 overloaded": 1},
        "slo_attainment": pytest.approx(2 / 3),
    }
    assert {key: document[key] for key in expected} == expected
    for name in ("ttft", "tpot", "itl", "e2el"):
        for part in ("mean", "median", "std", "p50", "p90", "p99"):
            assert f"{part}_{name}_ms" in document
    assert document["mean_ttft_ms"] == pytest.approx(150.0)
    assert document["metadata"]["git_commit"] == "0123456789ab"


def test_any_label_and_model_make_a_file_name(make_result: MakeResult, tmp_path: Path) -> None:
    config = {"label": "a/" + "\u00fc" * 300, "result_dir": str(tmp_path)}
    result = replace(make_result(**config), model="folder/" + "m" * 300)
    assert save(result).parent == tmp_path
    assert save(result).name.startswith("a-\u00fc")


def test_a_result_that_cannot_be_written_after_all_is_told_in_one_line(
    make_result: MakeResult, tmp_path: Path
) -> None:
    (tmp_path / "r.json").mkdir()
    result = make_result(result_dir=str(tmp_path), result_filename="r.json")
    with pytest.raises(ConfigError, match=r"the result is not in .*r\.json: Is a directory"):
        save(result)


def test_what_a_server_says_and_calls_itself_cannot_steer_the_terminal(
    make_result: MakeResult,
) -> None:
    result = make_result()
    failed = replace(result.records[0], failure=RequestFailure("http_500", "no\x1b[2J\x9b31m"))
    result = replace(result, model="m\x1b[2J", records=[failed])
    assert r"no\x1b[2J\x9b31m" in render_notes(result)
    assert "\x1b" not in render_notes(result) + str(result_path(result))


def test_secrets_stay_out_of_the_json(make_result: MakeResult) -> None:
    url = "http://me:sk-secret@host:8000"
    result = make_result(api_key=("sk-secret",), base_url=url)
    assert "sk-secret" not in json.dumps(to_json(result))
    assert to_json(result)["options"]["base_url"] == "http://me:[redacted]@host:8000"


def test_details_are_one_entry_per_request_and_only_when_asked_for(
    make_result: MakeResult,
) -> None:
    detailed = to_json(make_result(save_detailed=True))
    for key in ("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times"):
        assert len(detailed[key]) == 3
    assert detailed["errors"] == ["", "", "http_503 overloaded"]
    assert "ttfts" not in to_json(make_result())


def test_the_file_is_named_after_what_was_measured(make_result: MakeResult, tmp_path: Path) -> None:
    result = make_result(result_dir=str(tmp_path / "new"), max_concurrency=4, request_rate=2.5)
    assert result_path(result).name == "openai-2.5qps-concurrency4-model-20260102-030405.json"
    assert json.loads(save(result).read_text())["completed"] == 2


def test_without_a_success_there_are_no_times_to_show_and_each_reason_stands_once(
    make_result: MakeResult,
) -> None:
    failures = [
        RequestRecord(index=i, planned=0.0, failure=RequestFailure("http_404 model", "no such"))
        for i in range(3)
    ]
    result = make_result(failures, client_cpu=2.0)
    assert "TTFT" not in render_table(result)
    assert render_notes(result).splitlines() == [
        "Errors: 3 x http_404 model",
        "  no such (3 times)",
    ]
