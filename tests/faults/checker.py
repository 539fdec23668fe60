"""Judges a history: each request ends once, its tokens are the oracle's, and nothing hangs.

Invariants I1 (one ending), I2 (a prefix of the oracle's tokens, whole unless an error ended it)
and I9 (only requests that touched the faulty part may err). `leaks` judges I4, `accounts` I8.
Tokens computed from KV that was not verified, or that is another request's (I3, I5), are not the
oracle's: no two prompts of a row share their tokens, and a row proves that the oracle would tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.faults.history import ENDINGS, LAST

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
    may_break: Collection[int] = (),
    may_err: Collection[int] | None = None,
) -> list[str]:
    """What is wrong with a history, in words; nothing when it holds.

    `oracle`: each request's tokens in an undisturbed run. `may_break`: requests whose connection
    may break, because their gateway was killed. `may_err`: those that may end in an error at all;
    None: every one.
    """
    events = history.by_request()
    found = [
        f"request {number}: {problem}"
        for number, expected in oracle.items()
        for problem in _of_one(
            events.get(number, []), tuple(expected), allowed_codes, number in may_break
        )
    ]
    strangers = set(events) - set(oracle)
    found += [f"request {number}: not known to the oracle" for number in sorted(strangers)]
    if may_err is not None:
        bystanders = history.erred() - set(may_err)
        found += [f"request {number}: erred, but touched no fault" for number in sorted(bystanders)]
    return found


def wrong_tokens(history: History, oracle: Mapping[int, Sequence[int]]) -> int:
    """How many requests got a token that is not the oracle's."""
    events = history.by_request()
    return sum(
        _tokens(events.get(number, [])) != tuple(expected)[: len(_tokens(events.get(number, [])))]
        for number, expected in oracle.items()
    )


def hung(history: History) -> int:
    """How many requests have no end."""
    return sum(
        not any(event.kind in LAST and event.kind != "hung" for event in events)
        for events in history.by_request().values()
    )


def _of_one(
    events: Sequence[Event],
    expected: tuple[int, ...],
    allowed_codes: Collection[str],
    may_break: bool,
) -> Iterator[str]:
    kinds = [event.kind for event in events]
    if kinds[:1] != ["sent"]:
        yield "was never sent"
        return
    if "hung" in kinds:
        yield "hung"
    if "broken" in kinds and not may_break:
        yield "its connection broke"
    endings = [event for event in events if event.kind in ENDINGS]
    is_excused = "left" in kinds or ("broken" in kinds and may_break)
    if len(endings) > 1 or (not endings and not is_excused):
        yield f"{len(endings)} endings"
    if endings and "tokens" in kinds[kinds.index(endings[0].kind) :]:
        yield "tokens after the ending"
    if kinds.count("done") > 1 or (kinds.count("done") == 1 and kinds[-1] != "done"):
        yield "[DONE] is not the last line"
    tokens = _tokens(events)
    if tokens != expected[: len(tokens)]:
        yield f"token {_first_difference(tokens, expected)} is not the oracle's"
    for ending in endings:
        if ending.kind == "finished" and len(tokens) != len(expected):
            yield f"finished with {len(tokens)} of {len(expected)} tokens"
        if ending.kind != "finished" and ending.detail not in allowed_codes:
            yield f"ended with {ending.detail}"


def _tokens(events: Sequence[Event]) -> tuple[int, ...]:
    return tuple(token for event in events for token in event.token_ids)


def _first_difference(tokens: Sequence[int], expected: Sequence[int]) -> int:
    same = (mine == theirs for mine, theirs in zip(tokens, expected, strict=False))
    return next((index for index, is_same in enumerate(same) if not is_same), len(expected))
