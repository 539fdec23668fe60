"""A sequence is found in a node's log by the id of its request, within bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.errors import NodeLost
from cluster.request import SamplingParams, SequenceRequest
from cluster.sequence_log import SequenceLog

if TYPE_CHECKING:
    import pytest


def sequence(name: str) -> SequenceRequest:
    sampling = SamplingParams(max_tokens=4, seed=0)
    return SequenceRequest(
        sequence_id=name, request_id=f"request-{name}", prompt_token_ids=(1,), sampling=sampling
    )


def test_both_ids_are_on_what_is_said_after_the_end_too(caplog: pytest.LogCaptureFixture) -> None:
    log = SequenceLog()
    log.taken(sequence("a"))
    with caplog.at_level("INFO"):
        log.ended("a", "handed off", 0.5, to="decode-1")
        log.failed("a", NodeLost("gone", reason="decode_lost"))
    ended, failed = (record.__dict__ for record in caplog.records)
    assert (ended["request_id"], ended["sequence_id"]) == ("request-a", "a")
    assert (ended["outcome"], ended["seconds"], ended["to"]) == ("handed off", 0.5, "decode-1")
    assert (failed["request_id"], failed["error"]) == ("request-a", "node_lost")


def test_a_sequence_that_nobody_knows_has_its_own_id() -> None:
    assert SequenceLog().facts("x") == {"sequence_id": "x"}


def test_the_oldest_of_too_many_is_forgotten() -> None:
    log = SequenceLog(capacity=2)
    for name in ("a", "b", "a", "c"):
        log.taken(sequence(name))
    known = [name for name in ("a", "b", "c") if "request_id" in log.facts(name)]
    assert known == ["a", "c"]
