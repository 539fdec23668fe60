"""The admin API shows what runs, moves its levers, and opens to its own token alone."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi.openapi.utils import get_openapi

from cluster.errors import ConfigError, InternalError
from gateway.admin.app import admin_app
from tests.gateway.running_gateway import ADMIN_TOKEN, RunningGateway

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster.node import NodeName

MODEL = "org/test-model"
BODY = {"model": MODEL, "prompt": "one two three", "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def admin(gateway: RunningGateway) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {ADMIN_TOKEN}"}
    with httpx.Client(base_url=f"{gateway.admin.url}/admin/v1", headers=headers) as made:
        yield made


def test_nodes_are_shown_with_state_and_load(admin: httpx.Client) -> None:
    nodes = {node["name"]: node for node in admin.get("/nodes").json()["nodes"]}
    assert set(nodes) == {"prefill-0", "decode-0"}
    node = nodes["decode-0"]
    assert (node["role"], node["state"], node["is_connected"]) == ("decode", "ready", True)
    assert node["transports"] == ["loopback"]
    assert [nodes[name]["num_partners"] for name in ("prefill-0", "decode-0")] == [1, 1]
    assert node["load"]["num_free_blocks"] == node["load"]["num_blocks"] == 100_000
    assert node["load"]["num_transfers"] == 0


def test_a_node_serves_the_model_that_clients_name_from_the_checkpoint_of_its_folder(
    gateway: RunningGateway, admin: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = gateway.gateway.nodes.get("decode-0")
    assert entry is not None
    monkeypatch.setattr(entry, "info", replace(entry.info, model_name="a_folder"))
    nodes = {node["name"]: node for node in admin.get("/nodes").json()["nodes"]}
    assert (nodes["decode-0"]["model"], nodes["decode-0"]["checkpoint"]) == (MODEL, "a_folder")


def test_a_nodes_load_is_what_it_says_now_and_not_its_last_heartbeat(
    gateway: RunningGateway, admin: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached() -> int:
        nodes = {node["name"]: node for node in admin.get("/nodes").json()["nodes"]}
        num_blocks: int = nodes["prefill-0"]["load"]["num_cached_blocks"]
        return num_blocks

    node = gateway.prefill
    load = replace(node.info.load, num_cached_blocks=7)
    monkeypatch.setattr(node, "info", replace(node.info, load=load))
    assert cached() == 7

    async def never() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(node, "inspect", never)
    assert cached() == 0, "of a node that says nothing the last heartbeat counts"


@pytest.mark.parametrize("asked", ["to-cancel", "cmpl-to-cancel"])  # its id, its answer's
def test_requests_are_shown_and_can_be_cancelled(
    gateway: RunningGateway, admin: httpx.Client, asked: str
) -> None:
    gateway.do(gateway.decode.gates.tokens.clear)
    url = f"{gateway.url}/v1/completions"
    headers = {"x-request-id": "to-cancel"}
    try:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(httpx.post, url, json={**BODY, "n": 2}, headers=headers)
            gateway.until(lambda: gateway.gateway.measures.num_running == 2)
            [shown] = admin.get("/requests").json()["requests"]
            named = [admin.get("/requests", params={"id": name}).json() for name in (asked, "no")]
            done = admin.post(f"/requests/{asked}:cancel")
            response = answer.result(20)
    finally:
        gateway.do(gateway.decode.gates.tokens.set)
    assert shown["id"] == "to-cancel"
    assert (shown["prefill_node"], shown["decode_node"]) == ("prefill-0", "decode-0")
    assert shown["output_tokens"] == 2
    assert len(shown["sequences"]) == 2
    assert 0 < shown["ttft_seconds"] < shown["age_seconds"]
    assert shown["state"] in ("handing_off", "running")
    assert (shown["num_retries"], shown["route"]) == (0, "completions")
    assert [[each["id"] for each in found["requests"]] for found in named] == [["to-cancel"], []]
    assert {c["node"] for c in shown["sequences"][0]["candidates"]} == {"prefill-0", "decode-0"}
    assert done.json() == {"id": asked, "num_cancelled": 2}
    assert (response.status_code, response.json()["error"]["code"]) == (499, "cancelled")
    assert admin.get("/requests").json() == {"requests": []}
    assert admin.post(f"/requests/{asked}:cancel").status_code == 404


def test_a_request_without_a_token_has_no_time_to_one(
    gateway: RunningGateway, admin: httpx.Client
) -> None:
    gateway.do(gateway.prefill.gates.first_token.clear)
    try:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(httpx.post, f"{gateway.url}/v1/completions", json=BODY)
            gateway.until(lambda: gateway.gateway.measures.num_waiting == 1)
            [shown] = admin.get("/requests").json()["requests"]
            gateway.do(gateway.prefill.gates.first_token.set)
            assert answer.result(20).status_code == 200
    finally:
        gateway.do(gateway.prefill.gates.first_token.set)
    assert (shown["ttft_seconds"], shown["output_tokens"]) == (None, 0)
    assert shown["age_seconds"] > 0


def ended(admin: httpx.Client, **query: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = admin.get("/requests/ended", params=query).json()["requests"]
    return found


def until_ended(gateway: RunningGateway, name: str) -> None:
    """Its answer is out a moment before it is counted."""
    book = gateway.gateway.book
    gateway.until(lambda: bool(book.last(1, is_asked_for=lambda each: each.request_id == name)))


def ask(gateway: RunningGateway, name: str, **changes: Any) -> httpx.Response:
    url, headers = f"{gateway.url}/v1/completions", {"x-request-id": name}
    return httpx.post(url, json={**BODY, **changes}, headers=headers)


def test_how_the_last_requests_ended_is_shown_latest_first(
    gateway: RunningGateway, admin: httpx.Client
) -> None:
    assert ask(gateway, "well").status_code == 200
    assert ask(gateway, "refused", temperature=-1).status_code == 400
    until_ended(gateway, "well")
    until_ended(gateway, "refused")
    refused, well = ended(admin, last=2)
    assert (well["id"], well["status"], well["finish"], well["error"]) == (
        *("well", 200, "length", None),
    )
    assert (well["nodes"], well["num_retries"]) == ("prefill-0 > decode-0", 0)
    assert (well["prompt_tokens"], well["output_tokens"]) == (4, 8)
    assert 0 < well["ttft_seconds"] < well["duration_seconds"]
    assert 0 <= refused["ended_seconds_ago"] <= well["ended_seconds_ago"]
    assert (refused["error"], refused["param"]) == ("invalid_value", "temperature")
    assert (refused["nodes"], refused["ttft_seconds"]) == (None, None)


def test_ended_requests_are_found_by_failure_and_by_either_id(
    gateway: RunningGateway, admin: httpx.Client
) -> None:
    ask(gateway, "bad-1", temperature=-1)
    answer_id = ask(gateway, "good-1").json()["id"]
    until_ended(gateway, "good-1")
    assert ended(admin, failed=True, last=1)[0]["id"] == "bad-1"
    assert [each["id"] for each in ended(admin, id=answer_id)] == ["good-1"]
    assert ended(admin, id="good-1", failed=True) == []
    assert admin.get("/requests/ended", params={"last": 0}).status_code == 400


def test_what_no_pair_can_take_is_among_the_failed(
    gateway: RunningGateway, admin: httpx.Client
) -> None:
    admin.post("/nodes/decode-0:cordon")
    try:
        assert ask(gateway, "no-pair").json()["error"]["code"] == "no_capacity"
    finally:
        admin.post("/nodes/decode-0:uncordon")
    [shown] = ended(admin, id="no-pair")
    assert (shown["status"], shown["error"], shown["num_retries"]) == (503, "no_capacity", 0)


def test_nothing_that_was_written_or_answered_is_kept(
    gateway: RunningGateway, admin: httpx.Client
) -> None:
    ask(gateway, "quiet-1", prompt="xylophone secret words")
    ask(gateway, "quiet-2", prompt=["xylophone", 5])
    ask(gateway, "quiet-3", model="xylophone")
    until_ended(gateway, "quiet-3")
    text = str([ended(admin, id=f"quiet-{number}") for number in (1, 2, 3)])
    assert "xylophone" not in text


def test_leases_are_asked_of_every_node(admin: httpx.Client) -> None:
    answer = admin.get("/leases").json()
    assert {lease["node"] for lease in answer["leases"]} == {"prefill-0", "decode-0"}
    assert answer["leases"][0]["num_blocks"] == 3
    assert answer["unreachable"] == []


def test_a_cordoned_node_gets_no_work_until_uncordoned(
    gateway: RunningGateway, admin: httpx.Client
) -> None:
    url = f"{gateway.url}/v1/completions"
    assert admin.post("/nodes/decode-0:cordon").json()["state"] == "cordoned"
    assert httpx.post(url, json=BODY).json()["error"]["code"] == "no_capacity"
    assert admin.post("/nodes/decode-0:uncordon").json()["state"] == "ready"
    assert httpx.post(url, json=BODY).status_code == 200
    assert admin.post("/nodes/decode-0:drain").json()["state"] == "draining"
    assert admin.post("/nodes/decode-0:uncordon").json()["state"] == "ready"
    assert admin.post("/nodes/nobody:cordon").status_code == 404
    assert admin.post("/prefix-cache:reset").json() == {"nodes": ["decode-0", "prefill-0"]}
    assert [node.num_cache_resets for node in gateway.nodes.values()] == [1, 1]


def test_a_node_that_does_not_reset_its_cache_keeps_no_other_from_it(
    admin: httpx.Client, gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise InternalError("not now")

    before = gateway.prefill.num_cache_resets
    monkeypatch.setattr(gateway.decode, "reset_prefix_cache", refuse)
    answer = admin.post("/prefix-cache:reset")
    assert answer.status_code == 503
    assert "Not reset: decode-0 (internal)." in answer.json()["error"]["message"]
    assert gateway.prefill.num_cache_resets == before + 1


def test_the_policy_changes_at_once_or_not_at_all(
    gateway: RunningGateway, admin: httpx.Client
) -> None:
    before = admin.get("/policy").json()
    assert before["kv_load_failure_policy"] == "fail"
    changed = admin.patch("/policy", json={"local_prefill_tokens": 10_000, "stream_interval": 4})
    assert changed.json()["local_prefill_tokens"] == 10_000
    num_prefilled = len(gateway.prefill.submitted)
    assert httpx.post(f"{gateway.url}/v1/completions", json=BODY).status_code == 200
    assert len(gateway.prefill.submitted) == num_prefilled  # prefilled on the decode node
    bad: list[dict[str, Any]] = [
        {"local_prefill_tokens": 5, "stream_interval": 0},
        {"local_prefill_tokens": 5, "unknown": 1},
        {"local_prefill_tokens": "5"},
        {"local_prefill_tokens": 5, "kv_load_failure_policy": "other"},
    ]
    for change in bad:
        refused = admin.patch("/policy", json=change)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"]
    assert admin.get("/policy").json() == changed.json()
    recompute = admin.patch("/policy", json={"kv_load_failure_policy": "recompute"})
    assert recompute.json() == {**changed.json(), "kv_load_failure_policy": "recompute"}
    assert admin.patch("/policy", json=before).json() == before


def test_all_sequences_of_a_request_have_one_policy(
    new_gateway: Callable[..., RunningGateway],
) -> None:
    """Each of its prompts waits for a look-up, and an operator may change the policy meanwhile."""
    running = new_gateway(num_prefill=2)
    policy, match = running.gateway.policy, running.index.match
    running.do(running.decode.gates.tokens.clear)

    async def change(*asked: Any) -> dict[NodeName, int]:
        policy.change(stream_recovery=running.index.num_asked == 0)
        return await match(*asked)

    running.index.match = change  # type: ignore[assignment,method-assign]
    with ThreadPoolExecutor(1) as pool:
        body = {**BODY, "prompt": ["one two three", "four five six"]}
        answer = pool.submit(httpx.post, f"{running.url}/v1/completions", json=body)
        running.until(lambda: len(running.decode.submitted) == 2)
        active = running.gateway.dispatcher.active.values()
        assert [each.stream.recovers for each in active] == [False, False]
        running.do(running.decode.gates.tokens.set)
        assert answer.result(20).status_code == 200


def test_a_setting_that_the_policy_has_not_is_answered_with_what_it_has(
    admin: httpx.Client,
) -> None:
    def told(name: str) -> str:
        return str(admin.patch("/policy", json={name: 2}).json()["error"]["message"])

    assert told("stream_intervl") == (
        "The policy has no 'stream_intervl'. Did you mean stream_interval?"
    )
    assert "There are local_prefill_tokens, stream_interval" in told("x")


def test_a_node_that_is_not_there_is_answered_with_those_that_are(admin: httpx.Client) -> None:
    error = admin.post("/nodes/decode-9:drain").json()["error"]
    assert error["message"] == "There is no node decode-9; known: decode-0, prefill-0."
    assert error["param"] == "name"


@pytest.mark.parametrize(
    "path", ["nodes", "requests", "leases", "policy", "openapi.json", "nothing", "../v1/models"]
)
def test_nothing_is_shown_without_the_token(gateway: RunningGateway, path: str) -> None:
    url = f"{gateway.admin.url}/admin/v1/{path}"
    for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": ADMIN_TOKEN + "x"}):
        response = httpx.get(url, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "null"}],
)
def test_pages_of_other_sites_are_refused_even_with_the_token(
    admin: httpx.Client, headers: dict[str, str]
) -> None:
    response = admin.get("/nodes", headers=headers)
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "permission_denied"


def test_a_clients_key_does_not_open_the_admin_api(
    new_gateway: Callable[..., RunningGateway],
) -> None:
    running = new_gateway(api_key=("client-key",))
    url = f"{running.admin.url}/admin/v1/nodes"
    assert httpx.get(url, headers={"authorization": "Bearer client-key"}).status_code == 401


def test_the_documents_of_both_apis_are_made_once(
    new_gateway: Callable[..., RunningGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes 50 ms, in which every stream stands still."""
    running, made = new_gateway(), []
    make = get_openapi

    def noted(**asked: Any) -> dict[str, Any]:
        made.append(asked["title"])
        return make(**asked)

    monkeypatch.setattr("gateway.app.get_openapi", noted)
    headers = {"authorization": f"Bearer {ADMIN_TOKEN}"}
    for url in (f"{running.url}/openapi.json", f"{running.admin.url}/admin/v1/openapi.json"):
        first, second = (httpx.get(url, headers=headers).json() for _ in range(2))
        assert first == second
    assert made == ["Baton", "Baton admin"]


def test_an_admin_api_without_a_token_does_not_start(gateway: RunningGateway) -> None:
    with pytest.raises(ConfigError):
        admin_app(gateway.gateway, token="", host="127.0.0.1", observe=lambda _: None)


def test_the_admin_api_documents_itself(admin: httpx.Client) -> None:
    paths = admin.get("/openapi.json").json()["paths"]
    assert set(paths["/admin/v1/nodes/{name}:drain"]["post"]["responses"]) == {"200", "default"}
    assert "/admin/v1/nodes/{name}:cordon" in paths
    assert "/admin/v1/policy" in paths


def test_a_node_that_leaves_while_it_is_asked_costs_the_answer_of_no_other(
    new_gateway: Callable[..., RunningGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = new_gateway()
    asked: list[bool] = []

    async def never() -> None:
        asked.append(True)
        await asyncio.Event().wait()

    monkeypatch.setattr(running.prefill, "inspect", never)
    url = f"{running.admin.url}/admin/v1/leases"
    headers = {"authorization": f"Bearer {ADMIN_TOKEN}"}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.get, url, headers=headers, timeout=20)
        running.until(lambda: bool(asked))
        running.do(running.gateway.nodes.retire, running.prefill.info.id)
        found = answer.result(20).json()
    assert found["unreachable"] == ["prefill-0"]
    assert [lease["node"] for lease in found["leases"]] == ["decode-0"]
