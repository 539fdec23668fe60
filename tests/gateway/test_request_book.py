"""The last requests are remembered, of each outcome as many, and never more than that."""

from __future__ import annotations

from itertools import count

from cluster.errors import InvalidRequest, NodeLost
from gateway.lost_clients import CLIENT_GONE
from gateway.request_book import MAX_NAME_CHARS, EndedRequest, RequestBook


def book(capacity: int = 3) -> RequestBook:
    seconds = count(100)
    return RequestBook(capacity, wall_clock=lambda: float(next(seconds)))


def ended(name: str, status: int = 200, **facts: str) -> EndedRequest:
    return EndedRequest(request_id=name, route="chat", status=status, **facts)  # type: ignore[arg-type]


def names(found: list[tuple[float, EndedRequest]]) -> list[str]:
    return [request.request_id for _, request in found]


def test_many_that_go_well_push_out_none_that_failed() -> None:
    kept = book()
    kept.refused("lost", "chat", 503, NodeLost("gone", reason="decode_lost"))
    kept.refused("bad", "chat", 400, InvalidRequest("no", param="n"))
    for number in range(10):
        kept.keep(ended(f"well-{number}"))
    assert names(kept.last(10)) == ["well-9", "well-8", "well-7", "bad", "lost"]
    assert names(kept.last(10, failed_only=True)) == ["bad", "lost"]


def test_a_client_that_leaves_gets_no_error_and_pushes_out_none() -> None:
    kept = book()
    kept.refused("bad", "chat", 400, InvalidRequest("no", param="n"))
    for number in range(5):
        kept.keep(ended(f"left-{number}", 499, error="cancelled", reason=CLIENT_GONE))
    assert names(kept.last(10)) == ["left-4", "left-3", "left-2", "bad"]
    assert names(kept.last(10, failed_only=True)) == ["bad"]


def test_those_of_all_outcomes_come_in_one_order() -> None:
    kept = book()
    for number, status in enumerate((200, 503, 200, 400, 503)):
        kept.keep(ended(str(number), status))
    assert names(kept.last(10)) == ["4", "3", "2", "1", "0"]
    assert [at for at, _ in kept.last(2)] == [104.0, 103.0]
    assert names(kept.last(10, is_asked_for=lambda each: each.status == 200)) == ["2", "0"]


def test_names_that_a_client_chose_are_cut() -> None:
    kept = book()
    kept.refused("a", "chat", 400, InvalidRequest("no", param="x" * 10_000))
    kept.keep(ended("b", model="m" * 10_000))
    lengths = [len(each.param or each.model or "") for _, each in kept.last(2)]
    assert lengths == [MAX_NAME_CHARS, MAX_NAME_CHARS]
