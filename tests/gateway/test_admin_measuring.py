"""`POST /admin/v1/hand-offs:measure`: one pair at a time, and a typed error where it cannot be."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from cluster.proto import node_pb2 as pb
from tests.gateway.running_gateway import ADMIN_TOKEN, RunningGateway

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.node import NodeInfo

PAIR = {"prefill": "prefill-0", "decode": "decode-0"}
PATH = "/hand-offs:measure"


@pytest.fixture(scope="module")
def admin(gateway: RunningGateway) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {ADMIN_TOKEN}"}
    base_url = f"{gateway.admin.url}/admin/v1"
    with httpx.Client(base_url=base_url, headers=headers, timeout=30) as made:
        yield made


class Measuring:
    """In place of what the decode node does."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.may_end = asyncio.Event()

    async def measure(self, prefill: NodeInfo) -> pb.MeasureHandoffReply:
        self.asked.append(prefill.id.name)
        await self.may_end.wait()
        return pb.MeasureHandoffReply(
            transport="tcp",
            num_bytes=1000,
            seconds=0.5,
            reference="plain socket",
            reference_bytes_per_second=4000.0,
            device="cpu",
            unit_bytes=10,
        )


@pytest.fixture
def measuring(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> Measuring:
    made = Measuring()
    entry: Any = gateway.gateway.nodes.get("decode-0")
    monkeypatch.setattr(entry.client.calls, "measure", made.measure)
    return made


def test_what_a_pair_measured_is_shown_as_a_rate(
    gateway: RunningGateway, admin: httpx.Client, measuring: Measuring
) -> None:
    gateway.do(measuring.may_end.set)
    assert admin.post(PATH, json=PAIR).json() == PAIR | {
        "transport": "tcp",
        "device": "cpu",
        "num_bytes": 1000,
        "unit_bytes": 10,
        "seconds": 0.5,
        "bytes_per_second": 2000.0,
        "reference": "plain socket",
        "reference_bytes_per_second": 4000.0,
    }
    assert measuring.asked == ["prefill-0"]


def test_one_pair_is_measured_at_a_time(
    gateway: RunningGateway, admin: httpx.Client, measuring: Measuring
) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(admin.post, PATH, json=PAIR)
        gateway.until(lambda: measuring.asked)
        second = admin.post(PATH, json=PAIR)
        gateway.do(measuring.may_end.set)
        assert first.result(30).status_code == 200
    assert second.status_code == 503
    assert "being measured" in second.json()["error"]["message"]
    assert admin.post(PATH, json=PAIR).status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prefill": "prefill-0"}, 400),
        ({**PAIR, "address": "10.0.0.1:1"}, 400),
        ({**PAIR, "decode": "nobody"}, 404),
        ({"prefill": "decode-0", "decode": "prefill-0"}, 400),
    ],
    ids=["no decode", "an address", "unknown", "roles"],
)
def test_only_two_nodes_of_this_cluster_are_measured(
    admin: httpx.Client, measuring: Measuring, body: dict[str, str], status: int
) -> None:
    answer = admin.post(PATH, json=body)
    assert answer.status_code == status
    assert "error" in answer.json()
    assert measuring.asked == []


def test_a_node_that_cannot_measure_is_a_typed_error(admin: httpx.Client) -> None:
    answer = admin.post(PATH, json=PAIR)
    assert answer.status_code == 503
    assert "older" in answer.json()["error"]["message"]
