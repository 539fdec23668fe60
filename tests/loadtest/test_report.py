"""What people read of a measurement."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loadtest.record import RequestFailure, RequestRecord
from loadtest.report import render_notes, render_table
from loadtest.result_file import result_path
from tests.loadtest.results import two_answers_and_a_refusal

if TYPE_CHECKING:
    from tests.loadtest.results import MakeResult

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


def test_what_a_server_says_and_calls_itself_cannot_steer_the_terminal(
    make_result: MakeResult,
) -> None:
    result = make_result()
    failed = replace(result.records[0], failure=RequestFailure("http_500", "no\x1b[2J\x9b31m"))
    result = replace(result, model="m\x1b[2J", records=[failed])
    assert r"no\x1b[2J\x9b31m" in render_notes(result)
    assert "\x1b" not in render_notes(result) + str(result_path(result))


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
