from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.sse import MAX_EVENT_BYTES, Event, EventParser, EventTooLarge

STREAM = (
    b": keep-alive\n\n"
    b'data: {"a":1}\n\n'
    b"event: error\r\ndata: one\r\ndata: two\r\n\r\n"
    b"\n\n"
    b"data:bare\r\r"
    b"id: 7\nretry: 5\n\n"
    b"data: [DONE]\n\n"
)
EVENTS = [
    Event(b"", b'{"a":1}'),
    Event(b"error", b"one\ntwo"),
    Event(b"", b"bare"),
    Event(b"", b"[DONE]"),
]


def parse(*pieces: bytes) -> list[Event]:
    parser = EventParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def test_comments_line_endings_and_data_over_several_lines_are_understood() -> None:
    assert parse(STREAM) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_do_not_depend_on_how_the_bytes_were_split(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in itertools.pairwise(edges)]
    assert parse(*pieces) == EVENTS


def test_an_event_that_was_not_finished_is_not_given() -> None:
    assert parse(b"data: whole\n\ndata: half\n") == [Event(b"", b"whole")]


def test_an_event_without_end_is_refused_and_not_kept_in_memory_without_bound() -> None:
    parser = EventParser()
    parser.feed(b"data: ")
    with pytest.raises(EventTooLarge):
        parser.feed(b"x" * (MAX_EVENT_BYTES + 1))
