"""Judges a history: each request ends once, its tokens are the oracle's, and nothing hangs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.faults.history import ENDINGS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from tests.faults.history import Event, History

# What may be said of a fault of the machinery. All are 503 or 504: the client may try again.
FAULT_CODES = frozenset({"node_lost", "kv_load_failed", "no_capacity", "deadline_exceeded"})


def violations(
    history: History,
    oracle: Mapping[int, Sequence[int]],
    *,
    allowed_codes: Collection[str] = FAULT_CODES,
) -> list[str]:
    """What is wrong with a history, in words; nothing when it holds. `oracle`: each request's
    tokens in an undisturbed run."""
    found = [
        f"request {number}: {problem}"
        for number, expected in oracle.items()
        for problem in _of_one(history.of(number), tuple(expected), allowed_codes)
    ]
    strangers = {event.request for event in history.events} - set(oracle)
    return found + [f"request {number}: not known to the oracle" for number in sorted(strangers)]


def _of_one(
    events: Sequence[Event], expected: tuple[int, ...], allowed_codes: Collection[str]
) -> Iterator[str]:
    kinds = [event.kind for event in events]
    if kinds[:1] != ["sent"]:
        yield "was never sent"
        return
    if "hung" in kinds:
        yield "hung"
    if "broken" in kinds:
        yield "its connection broke"
    endings = [event for event in events if event.kind in ENDINGS]
    has_left = "left" in kinds
    if len(endings) > 1 or (not endings and not has_left):
        yield f"{len(endings)} endings"
    if endings and "tokens" in kinds[kinds.index(endings[0].kind) :]:
        yield "tokens after the ending"
    if kinds.count("done") > 1 or (kinds.count("done") == 1 and kinds[-1] != "done"):
        yield "[DONE] is not the last line"
    tokens = tuple(token for event in events for token in event.token_ids)
    if tokens != expected[: len(tokens)]:
        yield f"token {_first_difference(tokens, expected)} is not the oracle's"
    for ending in endings:
        if ending.kind == "finished" and len(tokens) != len(expected):
            yield f"finished with {len(tokens)} of {len(expected)} tokens"
        if ending.kind != "finished" and ending.detail not in allowed_codes:
            yield f"ended with {ending.detail}"


def _first_difference(tokens: Sequence[int], expected: Sequence[int]) -> int:
    same = (mine == theirs for mine, theirs in zip(tokens, expected, strict=False))
    return next((index for index, is_same in enumerate(same) if not is_same), len(expected))
