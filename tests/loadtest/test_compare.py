"""Two results beside each other."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from cluster.errors import ConfigError, UsageError
from loadtest.__main__ import main
from loadtest.compare import render_comparison

if TYPE_CHECKING:
    from pathlib import Path


def result(**changes: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "label": None,
        "model_id": "m",
        "completed": 10,
        "failed": 0,
        "request_throughput": 2.0,
        "request_goodput": None,
        "median_ttft_ms": 50.0,
        "options": {"num_prompts": 10, "base_url": "http://a"},
        **changes,
    }


def test_ratios_are_the_second_over_the_first() -> None:
    second = result(label="new", request_throughput=3.0, median_ttft_ms=25.0)
    second["options"] = {"num_prompts": 10, "base_url": "http://b"}
    assert [line.split() for line in render_comparison(result(), second).splitlines()] == [
        ["first", "new", "ratio"],
        ["Successful", "requests", "10", "10"],
        ["Failed", "requests", "0", "0"],
        ["Request", "throughput", "(req/s)", "2.00", "3.00", "1.500x"],
        ["Median", "TTFT", "(ms)", "50.00", "25.00", "0.500x"],
    ]


def test_what_was_measured_differently_is_said() -> None:
    options = {"num_prompts": 20, "goodput": ["ttft:5", "tpot:1"], "metric_percentiles": "50"}
    second = result(model_id="n", options=options)
    text = render_comparison(result(request_throughput=0.0), second)
    assert text.splitlines()[-3:] == [
        "Different: model m and n",
        "Different: --goodput none and ttft:5 tpot:1",
        "Different: --num-prompts 10 and 20",
    ]


def test_a_run_that_was_cut_short_is_said() -> None:
    cut = result(cut={"num_running": 1, "num_unsent": 5})
    last = render_comparison(result(cut=None), cut).splitlines()[-1]
    assert last == "Different: the second was cut short, its last requests are missing"


def test_a_cache_that_was_warm_in_one_run_alone_is_said() -> None:
    """Of the same prompts, sent twice, the second run measures the cache."""
    cold = result(total_input_tokens=1000, total_cached_tokens=0)
    warm = result(total_input_tokens=1000, total_cached_tokens=960)
    last = render_comparison(cold, warm).splitlines()[-1]
    assert last == "Different: 0% and 96% of the prompt tokens were cached"
    assert "Different" not in render_comparison(warm, warm)


def test_a_report_gets_a_table_in_markdown() -> None:
    text = render_comparison(result(label="a|b"), result(model_id="n"), markdown=True)
    assert text.splitlines() == [
        "|  | a\\|b | second | ratio |",
        "|---|---:|---:|---:|",
        "| Successful requests | 10 | 10 |  |",
        "| Failed requests | 0 | 0 |  |",
        "| Request throughput (req/s) | 2.00 | 2.00 | 1.000x |",
        "| Median TTFT (ms) | 50.00 | 50.00 | 1.000x |",
        "",
        "Different: model m and n",
    ]


def test_the_command_reads_two_files_and_refuses_what_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps(result()))
    assert main(["compare", str(first), str(first)]) == 0
    assert "1.000x" in capsys.readouterr().out
    broken = {"mean_ttft_ms": "x"}, {"options": None}, {"total_cached_tokens": [1]}
    for text in ("[]", *(json.dumps(result() | change) for change in broken)):
        other.write_text(text)
        with pytest.raises(ConfigError, match="is no result"):
            main(["compare", str(first), str(other)])
    for text in ("x", "[" * 100_000):
        other.write_text(text)
        with pytest.raises(ConfigError, match="is not JSON"):
            main(["compare", str(first), str(other)])
    with pytest.raises(ConfigError, match=r"cannot be read: No such file or directory\.$"):
        main(["compare", str(first), str(tmp_path / "c.json")])
    other.write_text(json.dumps(result() | {"label": "\x1b[31m"}))
    assert main(["compare", str(first), str(other)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert main(["compare", "--markdown", str(first), str(first)]) == 0
    assert capsys.readouterr().out.startswith("|  | first | second | ratio |")
    with pytest.raises(UsageError, match="two files"):
        main(["compare", str(first)])
