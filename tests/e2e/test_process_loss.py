"""`kill -9` of a node at any moment: one typed error for whom it touched, nothing else."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import openai
import pytest

from tests.e2e.cluster_process import ClusterProcess, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.e2e
ERROR_WITHIN_SECONDS = 5.0


@dataclass
class Ending:
    """How one stream ended: its text, or the code of its one error, and when."""

    text: str
    code: str | None
    at: float


def run_stream(client: openai.OpenAI, number: int) -> Ending:
    text = ""
    try:
        for chunk in client.completions.create(
            model="pocket",
            prompt=f"{'some words ' * (20 + number)}",
            max_tokens=400,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            text += chunk.choices[0].text
    except openai.APIError as error:
        return Ending(text, str(error.code), time.monotonic())
    return Ending(text, None, time.monotonic())


@pytest.fixture
def two_by_two() -> Iterator[ClusterProcess]:
    running = ClusterProcess("--prefill", "2", "--decode", "2", "--dtype", "float32")
    yield running
    running.stop()


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("delay_seconds", [0.05, 0.6])
def test_a_killed_node_hurts_only_its_own_and_serves_again(
    two_by_two: ClusterProcess, victim: str, delay_seconds: float
) -> None:
    cluster = two_by_two
    with openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0, timeout=60) as client:
        expected = run_stream(client, 0).text
        with ThreadPoolExecutor(12) as pool:
            streams: list[Future[Ending]] = [pool.submit(run_stream, client, 0) for _ in range(12)]
            time.sleep(delay_seconds)  # the moment of the fault, not a wait for a condition
            cluster.kill(victim)
            killed_at = time.monotonic()
            endings = [stream.result(60) for stream in streams]
        failed = [ending for ending in endings if ending.code is not None]
        assert all(
            ending.code in ("node_lost", "kv_load_failed", "no_capacity") for ending in failed
        )
        assert all(ending.at - killed_at < ERROR_WITHIN_SECONDS for ending in failed)
        assert all(expected.startswith(ending.text) for ending in failed)
        assert all(ending.text == expected for ending in endings if ending.code is None)
        eventually(lambda: cluster.nodes().get(victim, {}).get("state") == "ready", seconds=40)
        eventually(cluster.all_blocks_are_back)
        with ThreadPoolExecutor(8) as pool:
            again = list(pool.map(lambda _: run_stream(client, 0), range(8)))
        assert [ending.code for ending in again] == [None] * 8
        assert {ending.text for ending in again} == {expected}


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_with_recompute_and_recovery_nobody_notices_a_killed_node(victim: str) -> None:
    cluster = ClusterProcess(
        *("--prefill", "2", "--decode", "2", "--dtype", "float32", "--stream-recovery"),
        *("--kv-load-failure-policy", "recompute", "--max-recomputes", "16"),
    )
    try:
        base_url = cluster.url
        with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60) as client:
            expected = run_stream(client, 0).text
            with ThreadPoolExecutor(12) as pool:
                streams = [pool.submit(run_stream, client, 0) for _ in range(12)]
                time.sleep(0.3)  # the moment of the fault, not a wait for a condition
                cluster.kill(victim)
                endings = [stream.result(60) for stream in streams]
        assert [ending.code for ending in endings] == [None] * 12
        assert {ending.text for ending in endings} == {expected}
        eventually(lambda: cluster.nodes().get(victim, {}).get("state") == "ready", seconds=40)
        eventually(cluster.all_blocks_are_back)
    finally:
        cluster.stop()


def test_ctrl_c_leaves_no_process_behind() -> None:
    cluster = ClusterProcess()
    pids = [cluster.child(name) for name in ("prefill-0", "decode-0", "gateway")]
    assert cluster.stop() == 0

    def gone(pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/stat") as status:
                return status.read().split()[2] == "Z"
        except FileNotFoundError:
            return True

    assert all(gone(pid) for pid in pids)
