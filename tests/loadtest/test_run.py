from __future__ import annotations

import asyncio
import json
import math
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from tokenizers import Tokenizer, models, pre_tokenizers

from cluster.errors import ConfigError, UsageError
from loadtest import client
from loadtest.__main__ import EXIT_NOT_READY, EXIT_NOTHING_SUCCEEDED, main
from loadtest.client import ServerNotReady
from loadtest.result_file import make_folder
from loadtest.run import measure, run

if TYPE_CHECKING:
    from pathlib import Path

Measured = Callable[..., Any]


def test_counts_come_from_the_server_and_requests_carry_the_key(measured: Measured) -> None:
    result, server = measured(num_prompts=5, num_warmups=2, api_key=("k", "other"), temperature=0.0)
    summary = result.summary
    assert (summary.completed, summary.failed) == (5, 0)
    assert (summary.total_input_tokens, summary.total_output_tokens) == (25, 20)
    assert summary.latencies["itl"].count == 5 * 3
    assert len(server.bodies) == 7
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer k"}
    assert [record.index for record in result.records] == [0, 1, 2, 3, 4]


def test_the_open_loop_does_not_wait_for_answers(measured: Measured, wire: Any) -> None:
    all_sent = asyncio.Event()

    async def hold(server: Any, request: web.Request, body: Any) -> Any:
        if server.in_flight == 4:
            all_sent.set()
        await all_sent.wait()  # a client that waited for an answer would wait for ever
        return await wire.answer_all_tokens(server, request, body)

    result, server = measured(hold, num_prompts=4)
    assert result.summary.completed == 4
    assert server.most_in_flight == 4
    assert result.summary.peak_concurrency == 4


def test_concurrency_stays_within_the_limit_and_reaches_it(measured: Measured, wire: Any) -> None:
    both = asyncio.Event()

    async def hold(server: Any, request: web.Request, body: Any) -> Any:
        if server.in_flight == 2:
            both.set()
        await both.wait()
        return await wire.answer_all_tokens(server, request, body)

    result, server = measured(hold, num_prompts=9, max_concurrency=2, num_warmups=3)
    assert result.summary.completed == 9
    assert server.most_in_flight == 2


def test_the_first_model_of_the_server_is_used_when_none_is_named(measured: Measured) -> None:
    result, server = measured(model=None)
    assert result.model == "scripted"
    assert {body["model"] for body in server.bodies} == {"scripted"}


def test_chat_goes_to_the_chat_route(measured: Measured, wire: Any) -> None:
    async def chat(_: Any, request: web.Request, __: Any) -> Any:
        delta = {"choices": [{"delta": {"content": "a"}, "finish_reason": None}]}
        return await wire.stream(request, wire.event(delta), wire.usage_chunk(9, 1), wire.done)

    result, server = measured(chat, backend="openai-chat")
    assert set(server.paths) == {"/v1/chat/completions"}
    assert result.summary.total_input_tokens == 27


async def refuse(_: Any, __: web.Request, ___: Any) -> Any:
    error = {"message": "full", "type": "server_error", "code": "overloaded"}
    return web.json_response({"error": error}, status=503)


async def refuse_in_html(_: Any, __: web.Request, ___: Any) -> Any:
    return web.Response(status=502, text="<html>bad gateway</html>", content_type="text/html")


async def answer_whole(_: Any, __: web.Request, ___: Any) -> Any:
    return web.json_response({"choices": [{"text": "a"}]})


async def hang_up(_: Any, request: web.Request, __: Any) -> Any:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b'data: {"choices":[{"text":"a"}]}\n\n')
    assert request.transport is not None
    request.transport.abort()
    return response


@pytest.mark.parametrize(
    ("script", "error_class"),
    [
        (refuse, "http_503 overloaded"),
        (refuse_in_html, "http_502"),
        (answer_whole, "not_a_stream"),
        (hang_up, "connection_lost"),
    ],
)
def test_failures_are_told_apart_by_class(
    measured: Measured, script: Any, error_class: str
) -> None:
    result, _ = measured(script)
    assert result.summary.failures_by_class == {error_class: 3}
    assert result.summary.completed == 0


def test_some_may_fail_and_the_rest_are_measured(measured: Measured, wire: Any) -> None:
    async def refuse_second(server: Any, request: web.Request, body: Any) -> Any:
        if len(server.bodies) == 2:
            return await refuse(server, request, body)
        return await wire.answer_all_tokens(server, request, body)

    result, _ = measured(refuse_second, max_concurrency=1)
    assert (result.summary.completed, result.summary.failed) == (2, 1)
    assert [record.succeeded for record in result.records] == [True, False, True]


def test_a_request_past_its_time_is_a_timeout(measured: Measured, wire: Any) -> None:
    async def never(_: Any, __: web.Request, ___: Any) -> Any:
        return await asyncio.get_running_loop().create_future()

    result, _ = measured(never, request_timeout=0.05, num_prompts=1)
    assert result.summary.failures_by_class == {"timeout": 1}


def closed_port_url() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_that_is_not_there_is_not_ready(bench_config: Any) -> None:
    url = closed_port_url()
    with pytest.raises(ServerNotReady) as refused:
        run(bench_config(base_url=url, model=None))
    assert refused.value.message == f"No server answers at {url}/v1/models: Connection refused."


def test_a_server_that_names_no_model_is_told_from_one_that_refuses_or_hangs(
    bench_config: Any, wire: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def told(answer: Any, **options: Any) -> str:
        async with wire.serving(wire.answer_all_tokens, models=answer) as server:
            with pytest.raises(ServerNotReady) as refused:
                await measure(bench_config(base_url=server.url, model=None, **options))
        return refused.value.message.partition("/v1/models ")[2]

    async def refuses(_: web.Request) -> web.Response:
        return web.Response(status=401)

    async def nothing(_: web.Request) -> web.Response:
        return web.json_response({"data": []})

    async def hangs(_: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    assert asyncio.run(told(refuses)) == "answers 401 Unauthorized; pass --api-key."
    assert asyncio.run(told(nothing)) == "names no model; pass --model."
    monkeypatch.setattr(client, "MODELS_SECONDS", 0.05)  # whatever a request may take
    assert asyncio.run(told(hangs)) == "did not answer in 0.05 s."


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_address_may_end_as_other_clients_have_it(bench_config: Any, end: str) -> None:
    config = bench_config(base_url=f"http://a:1/x{end}")
    assert config.server_url == "http://a:1/x"


@pytest.mark.parametrize(
    "place",
    [
        ("--save-result", "--result-dir", "file/x"),
        ("--result-filename", "folder", "--result-dir", "."),
        ("--result-filename", "x" * 300, "--result-dir", "."),
    ],
)
def test_a_result_that_could_not_be_written_is_told_before_anything_is_measured(
    wire: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)

    async def scenario() -> int:
        async with wire.serving(wire.answer_all_tokens) as server:
            arguments = ["run", "--base-url", server.url, "--num-prompts", "1", *place]
            with pytest.raises(ConfigError, match="nothing can be written into"):
                await asyncio.to_thread(main, arguments)
            return len(server.bodies)

    assert asyncio.run(scenario()) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_an_earlier_result_stays_until_there_is_a_new_one(
    bench_config: Any, tmp_path: Path
) -> None:
    earlier, new = tmp_path / "r.json", tmp_path / "new.json"
    earlier.write_text("earlier")
    for path in (earlier, new):
        make_folder(bench_config(result_dir=str(tmp_path), result_filename=path.name))
    assert earlier.read_text() == "earlier"
    assert not new.exists()


def test_the_command_ends_non_zero_when_nothing_succeeded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["run", "--base-url", closed_port_url(), "--num-prompts", "2"]
    assert main([*arguments, "--model", "m"]) == EXIT_NOTHING_SUCCEEDED
    shown = capsys.readouterr().out
    assert "Failed requests:                         2" in shown
    assert "Errors: 2 x connection_refused" in shown
    assert main(arguments) == EXIT_NOT_READY


def test_the_command_measures_prints_and_saves(
    wire: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> int:
        async with wire.serving(wire.answer_all_tokens) as server:
            arguments = ["run", "--base-url", server.url, "--num-prompts", "2"]
            arguments += ["--input-len", "5", "--output-len", "3"]
            # Whoever names a file means to have it.
            arguments += ["--result-dir", str(tmp_path), "--result-filename", "new/r.json"]
            return await asyncio.to_thread(main, arguments)

    assert asyncio.run(scenario()) == 0
    document = json.loads((tmp_path / "new" / "r.json").read_text())
    assert document["completed"] == 2
    assert document["total_output_tokens"] == 6
    assert "Serving Benchmark Result" in capsys.readouterr().out


def test_an_unknown_command_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="there are: run, compare"):
        main(["walk"])


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"request_rate": "fast"}, "request_rate"),
        ({"request_rate": 0.0}, "request_rate"),
        ({"percentile_metrics": "ttft,speed"}, "percentile_metrics"),
        ({"metric_percentiles": "50,101"}, "metric_percentiles"),
        ({"goodput": ("itl:5",)}, "goodput"),
        ({"goodput": ("ttft:-5",)}, "goodput"),
        ({"goodput": ("ttft",)}, "goodput"),
        ({"extra_body": "[1]"}, "extra_body"),
        ({"base_url": "localhost:8000"}, "base_url"),
        ({"base_url": "http://localhost:80a0"}, "base_url"),
        ({"base_url": "http://[::1"}, "base_url"),
        ({"api_key": ("key\n",)}, "api_key"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"random_range_ratio": 1.0}, "random_range_ratio"),
        ({"num_prompts": 0}, "num_prompts"),
        ({"num_prompts": 1 << 31}, "num_prompts"),
        ({"random_input_len": 1 << 63}, "random_input_len"),
        ({"random_output_len": 1 << 63}, "random_output_len"),
        ({"random_prefix_len": 1 << 64}, "random_prefix_len"),
        ({"random_vocab_size": 1 << 62}, "random_vocab_size"),
        ({"num_warmups": 1 << 31}, "num_warmups"),
        ({"request_rate": 5e-324}, "request_rate"),
        ({"burstiness": 0.0}, "burstiness"),
        ({"burstiness": math.nan}, "burstiness"),
        ({"extra_body": '{"a":' * 10_000 + "1" + "}" * 10_000}, "extra_body"),
        ({"extra_body": '{"a":' + "1" * 5_000 + "}"}, "extra_body"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(
    bench_config: Any, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        bench_config(**options)
    assert caught.value.param == param


@pytest.mark.parametrize("host", ["..", "a" * 300 + ".test"])
def test_a_host_that_cannot_be_one_does_not_answer(bench_config: Any, host: str) -> None:
    with pytest.raises(ServerNotReady, match="No server answers at http://"):
        run(bench_config(base_url=f"http://{host}", model=None))
    result = run(bench_config(base_url=f"http://{host}", num_prompts=1))
    assert result.summary.failed == 1


def test_gaps_may_all_be_alike(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--burstiness", "inf", "--show-config"]) == 0
    assert 'burstiness: "inf"' in capsys.readouterr().out


def test_answers_without_usage_are_counted_by_the_tokenizer(
    measured: Measured, wire: Any, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    async def script(_: Any, request: web.Request, __: Any) -> Any:
        chunks = (wire.text_chunk("a b"), wire.text_chunk(" b a", "stop"), wire.done)
        return await wire.stream(request, *chunks)

    result, _ = measured(script, tokenizer=str(tmp_path), num_prompts=1)
    assert result.records[0].counted_by == "tokenizer"
    assert result.summary.total_output_tokens == 4
