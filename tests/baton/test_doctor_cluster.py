"""`baton doctor --cluster`: one row for each pair, whatever became of its measurement."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from baton import doctor
from baton.admin_client import AdminClient, AdminRefused, AdminUnreachable
from baton.doctor_cluster import (
    NodePair,
    PairVerdict,
    cluster_table,
    judged,
    measure_cluster,
    pairs_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

NODES = [
    {"name": name, "role": name.partition("-")[0], "compatibility_hash": layout}
    for name, layout in (
        ("decode-1", "a"), ("decode-0", "a"), ("prefill-0", "a"), ("decode-2", "b"),
    )
]  # fmt: skip
FOUND = {
    "prefill": "prefill-0",
    "decode": "decode-0",
    "transport": "tcp",
    "device": "cpu",
    "num_bytes": 64 << 20,
    "unit_bytes": 64 << 10,
    "seconds": 0.02,
    "bytes_per_second": 3.2e9,
    "reference": "plain socket",
    "reference_bytes_per_second": 4e9,
}


class FakeAdmin(AdminClient):
    """Answers for one cluster; `answers` by the name of the decode node."""

    answers: dict[str, Any]
    asked: list[Mapping[str, object]]

    def __init__(self, **answers: Any) -> None:
        super().__init__("http://admin", None)
        object.__setattr__(self, "answers", answers)
        object.__setattr__(self, "asked", [])

    def get(self, path: str) -> dict[str, Any]:
        return {"nodes": NODES}

    def post(
        self, path: str, body: Mapping[str, object], timeout_seconds: float = 1.0
    ) -> dict[str, Any]:
        self.asked.append(body)
        answer = self.answers[str(body["decode"]).replace("-", "_")]
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)


def printed(pairs: list[NodePair], width: int = 120) -> str:
    console = Console(width=width, record=True)
    console.print(cluster_table(pairs))
    return console.export_text()


def pair(**facts: Any) -> NodePair:
    known = {"transport": "tcp", "num_bytes": 64 << 20, "rate": 3e9, "reference_rate": 4e9}
    known["unit_bytes"] = 64 << 10
    return NodePair(prefill="p", decode="d", verdict=PairVerdict.OK, **{**known, **facts})


def test_only_nodes_that_exchange_kv_are_pairs_in_order() -> None:
    found = list(pairs_of({"nodes": NODES}))
    assert found == [("prefill-0", "decode-0"), ("prefill-0", "decode-1")]


@pytest.mark.parametrize("document", [{}, {"nodes": None}, {"nodes": [{"name": "x"}]}])
def test_another_answer_is_no_list_of_nodes(document: dict[str, Any]) -> None:
    with pytest.raises(AdminUnreachable):
        list(pairs_of(document))


def test_one_pair_after_the_other_is_measured_and_shown_beside_the_plain_copy() -> None:
    client = FakeAdmin(decode_0=FOUND, decode_1=FOUND | {"bytes_per_second": 1e9})
    pairs = measure_cluster(client)
    assert client.asked == [
        {"prefill": "prefill-0", "decode": "decode-0"},
        {"prefill": "prefill-0", "decode": "decode-1"},
    ]
    good, slow, note = printed(pairs).splitlines()[1:4]
    assert re.search(r"prefill-0 +decode-0 +tcp +3\.20 +plain socket +4\.00 +0\.80x +ok", good)
    assert re.search(r"decode-1 +tcp +1\.00 .* 0\.25x +slow", slow)
    assert note.startswith("prefill-0 to decode-1: far below the plain copy")


def test_a_pair_that_is_refused_is_a_row_that_says_why_and_the_next_is_measured() -> None:
    busy = AdminRefused("The decode node is busy. (HTTP 503).")
    pairs = measure_cluster(FakeAdmin(decode_0=busy, decode_1=FOUND))
    assert [each.verdict for each in pairs] == [PairVerdict.NOT_MEASURED, PairVerdict.OK]
    assert pairs[0].note == "The decode node is busy."
    assert "not measured" in printed(pairs)


def test_an_answer_that_nobody_understands_is_a_row() -> None:
    (first, _) = measure_cluster(FakeAdmin(decode_0={"transport": "tcp"}, decode_1=FOUND))
    assert first.verdict is PairVerdict.NOT_MEASURED
    assert "own words" in first.note


def test_few_bytes_or_small_blocks_say_little_and_alarm_nobody() -> None:
    few = judged(pair(num_bytes=1 << 20, rate=1e9), on_gpu=False)
    small = judged(pair(unit_bytes=6 << 10, rate=1e9), on_gpu=False)
    assert "1.0 MiB" in few.note
    assert "6.0 KiB" in small.note
    assert few.verdict is small.verdict is PairVerdict.OK
    assert judged(pair(rate=1e9), on_gpu=False).verdict is PairVerdict.SLOW


@pytest.mark.parametrize(("transport", "is_noted"), [("tcp", True), ("cuda_ipc", False)])
def test_gpus_whose_kv_goes_through_host_memory_are_noted(transport: str, is_noted: bool) -> None:
    found = judged(pair(transport=transport), on_gpu=True)
    assert ("--require-transport" in found.note) is is_noted
    assert found.verdict is PairVerdict.OK


def test_notes_are_whole_on_a_narrow_terminal() -> None:
    verdict, note = PairVerdict.NOT_MEASURED, "This node takes no hand-offs."
    refused = NodePair(prefill="p", decode="d", verdict=verdict, note=note)
    lines = printed([pair(), refused], width=80).splitlines()
    assert lines[-1] == "p to d: This node takes no hand-offs."
    assert max(map(len, lines)) <= 80


def test_names_are_text_and_not_markup() -> None:
    text = printed([pair(note="[red]?[/red]")], width=160)
    assert "[red]?[/red]" in text


# ---- the command --------------------------------------------------------------------------


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> FakeAdmin:
    client = FakeAdmin(decode_0=FOUND, decode_1=FOUND)
    monkeypatch.setattr(doctor, "admin_client", lambda url, token: client)
    return client


def test_the_command_measures_the_cluster_and_nothing_else(
    admin: FakeAdmin, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: pytest.fail("looked at the machine"))
    assert doctor.main(["--cluster", "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [each["decode"] for each in document["pairs"]] == ["decode-0", "decode-1"]
    assert document["pairs"][0]["rate"] == 3.2e9


def test_a_pair_that_was_not_measured_is_an_error_of_the_command(
    admin: FakeAdmin, capsys: pytest.CaptureFixture[str]
) -> None:
    admin.answers["decode_1"] = AdminRefused("busy")
    assert doctor.main(["--cluster"]) == doctor.EXIT_NOT_READY
    assert "not measured" in capsys.readouterr().out


def test_an_admin_api_that_does_not_answer_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert doctor.main(["--cluster", "--admin-url", "nonsense"]) == doctor.EXIT_NOT_READY
    assert doctor.main(["--cluster", "--admin-url", "http://127.0.0.1:1"]) == doctor.EXIT_NOT_READY
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("baton doctor: --cluster: ") for line in lines)
