"""Stop strings are found wherever pieces are cut, and nothing of them slips out before."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from gateway.stop_strings import StopMatcher


def run(stops: list[str], chunks: list[str], *, include: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include=include)
    shown = ""
    for chunk in chunks:
        shown += matcher.push(chunk)
        if matcher.matched is not None:
            return shown, matcher.matched
    return shown + matcher.flush(), None


def test_a_stop_string_cut_over_pieces_is_found() -> None:
    assert run(["END"], ["one E", "N", "D two"]) == ("one ", "END")


def test_text_that_only_looked_like_a_stop_is_shown_in_the_end() -> None:
    assert run(["END"], ["one E", "N", "d two EN"]) == ("one ENd two EN", None)


def test_only_the_undecided_end_is_held_back() -> None:
    matcher = StopMatcher(["\n\nUser:"], include=False)
    assert matcher.push("hello\n") == "hello"
    assert matcher.push("x") == "\nx"


def test_the_stop_is_shown_when_asked_for() -> None:
    assert run(["END"], ["one EN", "D two"], include=True) == ("one END", "END")


def test_the_earliest_occurrence_wins_over_the_order_given() -> None:
    assert run(["second", "first"], ["a first b second"]) == ("a ", "first")


@given(
    text=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
    include=st.booleans(),
)
def test_nothing_of_a_stop_is_shown_wherever_pieces_are_cut(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    edges = sorted({0, len(text), *[min(cut, len(text)) for cut in cuts]})
    chunks = [text[a:b] for a, b in itertools.pairwise(edges)]
    shown, matched = run(stops, chunks, include=include)
    if matched is None:
        assert shown == text
        assert not any(stop in text for stop in stops)
        return
    before = shown.removesuffix(matched) if include else shown
    assert text.startswith(before + matched)
    assert not any(stop in before for stop in stops)
