"""What programs read of a measurement, and where they find it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cluster.errors import ConfigError
from loadtest.result_file import result_path, save, to_json

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loadtest.results import MakeResult


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


@pytest.mark.parametrize(("given", "told"), [("2", 2.0), ("inf", "inf")])
def test_a_shape_of_gaps_is_a_number_or_inf_however_it_was_given(
    make_result: MakeResult, given: str, told: float | str
) -> None:
    document = to_json(make_result(burstiness=given))
    assert document["burstiness"] == document["options"]["burstiness"] == told


def test_any_label_and_model_make_a_file_name(make_result: MakeResult, tmp_path: Path) -> None:
    config = {"label": "a/" + "\u00fc" * 300, "result_dir": str(tmp_path)}
    result = replace(make_result(**config), model="folder/" + "m" * 300)
    assert save(result).parent == tmp_path
    assert save(result).name.startswith("a-\u00fc")
    result = make_result(
        label="\udcff", result_dir=str(tmp_path)
    )  # of a shell's word that is no text
    assert save(result).name.startswith("?-")


def test_a_result_that_cannot_be_written_after_all_is_told_in_one_line(
    make_result: MakeResult, tmp_path: Path
) -> None:
    (tmp_path / "r.json").mkdir()
    result = make_result(result_dir=str(tmp_path), result_filename="r.json")
    with pytest.raises(ConfigError, match=r"the result is not in .*r\.json: Is a directory"):
        save(result)


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
