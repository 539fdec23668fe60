"""The main job, as an application sees it: the unmodified client against a real cluster."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.cluster_process import ADMIN_TOKEN, ClusterProcess, eventually

if TYPE_CHECKING:
    import openai

pytestmark = pytest.mark.e2e


def complete(client: openai.OpenAI, prompt: str | list[int], **options: Any) -> str:
    answer = client.completions.create(
        model="pocket",
        prompt=prompt,
        temperature=0,
        max_tokens=24,
        **options,
    )
    return str(answer.choices[0].text)


def test_a_chat_streams_readable_text_and_its_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="pocket",
        messages=[{"role": "user", "content": "What is Python?"}],
        temperature=0,
        max_tokens=48,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert len(text.split()) > 3
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 1
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons.count(None) == len(reasons) - 1


def test_the_prompts_kv_travels_over_ucx_and_the_metrics_name_the_transport(
    cluster: ClusterProcess, client: openai.OpenAI
) -> None:
    complete(client, "a prompt whose keys and values cross from one node to the other " * 4)
    eventually(lambda: "baton_kv_transport_info" in cluster.metrics())
    exported = cluster.metrics().splitlines()
    lines = [line for line in exported if line.startswith("baton_kv_transport_info")]
    assert any('transport="shm"' in line or 'transport="tcp"' in line for line in lines)
    assert any("transport" in line and "prefill-0" in line for line in cluster.lines)


def test_streamed_and_whole_answers_are_the_same(client: openai.OpenAI) -> None:
    whole = complete(client, "def main():")
    stream = client.completions.create(
        model="pocket", prompt="def main():", temperature=0, max_tokens=24, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == whole


def test_a_seed_draws_the_same_and_n_choices_differ(client: openai.OpenAI) -> None:
    def draw(seed: int) -> list[str]:
        answer = client.completions.create(
            model="pocket", prompt="The", temperature=1.0, max_tokens=16, n=3, seed=seed
        )
        return [choice.text for choice in answer.choices]

    first = draw(7)
    assert first == draw(7)
    assert len(set(first)) > 1


def test_sixteen_at_once_answer_as_each_alone(client: openai.OpenAI) -> None:
    prompts = [f"{'word ' * n}number {n}" for n in range(16)]
    alone = [complete(client, prompt) for prompt in prompts]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda prompt: complete(client, prompt), prompts))
    assert together == alone


def test_a_client_that_leaves_stops_the_work(
    cluster: ClusterProcess, client: openai.OpenAI
) -> None:
    stream = client.completions.create(
        model="pocket",
        prompt="go on and on",
        max_tokens=1500,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    eventually(lambda: not cluster.admin("requests")["requests"], seconds=5)
    eventually(cluster.all_blocks_are_back)


def test_models_and_health_are_served(cluster: ClusterProcess, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["pocket"]
    assert client.models.retrieve("pocket").id == "pocket"
    for path in ("health", "livez", "readyz", "version", "metrics"):
        with urllib.request.urlopen(f"{cluster.base_url}/{path}", timeout=10) as response:
            assert response.status == 200


def test_the_doctor_measures_the_pair_and_leaves_no_trace(
    cluster: ClusterProcess, client: openai.OpenAI
) -> None:
    complete(client, "what is cached before is cached after " * 8)
    eventually(cluster.all_blocks_are_back)
    cached = {name: node["load"]["num_cached_blocks"] for name, node in cluster.nodes().items()}
    command = [sys.executable, "-m", "baton", "doctor", "--cluster", "--output", "json"]
    options = ["--admin-url", cluster.admin_url, "--admin-token", ADMIN_TOKEN]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (pair,) = json.loads(done.stdout)["pairs"]
    assert (pair["prefill"], pair["decode"]) == ("prefill-0", "decode-0")
    assert pair["verdict"] in ("ok", "slow")
    assert pair["num_bytes"] > 1 << 20
    assert pair["rate"] > 0 < pair["reference_rate"]
    eventually(cluster.all_blocks_are_back)
    nodes = cluster.nodes().items()
    assert cached == {name: node["load"]["num_cached_blocks"] for name, node in nodes}
    assert all(cached.values())


BAD_BODIES = [
    pytest.param({"model": "nope", "prompt": "x"}, 404, id="unknown model"),
    pytest.param({"model": "pocket", "prompt": ""}, 400, id="empty prompt"),
    pytest.param({"model": "pocket", "prompt": []}, 400, id="empty list"),
    pytest.param({"model": "pocket", "prompt": [1, 10**9]}, 400, id="id out of vocabulary"),
    pytest.param({"model": "pocket", "prompt": "x " * 9000}, 400, id="oversized prompt"),
    pytest.param({"model": "pocket", "prompt": {"a": 1}}, 400, id="wrong type"),
    pytest.param({"model": "pocket", "prompt": "x", "temperature": "hot"}, 400, id="text heat"),
    pytest.param({"model": "pocket", "prompt": "x", "temperature": -1}, 400, id="below range"),
    pytest.param({"model": "pocket", "prompt": "x", "max_tokens": -5}, 400, id="negative length"),
    pytest.param({"model": "pocket", "prompt": "x", "n": 10**6}, 400, id="too many choices"),
    pytest.param(b'{"model": "pocket", "prompt": "x", "temperature": NaN}', 400, id="NaN"),
    pytest.param(b"not json", 400, id="not json"),
    pytest.param(b'{"model": "pocket", "prompt": "' + b"x" * (10 << 20) + b'"}', 413, id="10 MiB"),
]


@pytest.mark.parametrize(("body", "status"), BAD_BODIES)
def test_bad_input_gives_one_json_error_and_hurts_nobody(
    cluster: ClusterProcess, client: openai.OpenAI, body: object, status: int
) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{cluster.url}/completions", data=data, headers={"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    with caught.value as response:
        assert response.status == status
        error = json.load(response)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert complete(client, "The capital of France is")
