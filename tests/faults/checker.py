"""Judges a history: each request ends once, its tokens are the oracle's, and nothing hangs.

Invariants I1 (one ending), I2 (a prefix of the oracle's tokens, whole unless an error ended it,
then with the oracle's finish_reason and a usage that counts its prompt and these tokens),
I6 (somebody hears something in time, blocks of who has left come back in time) and I9 (only
requests that touched the faulty part may err). I3 (no KV that was not verified), I5 (tenants) and
I7 (fencing) are judged where blocks are, by the `witness` in each node: the history has what it
objects to. `leaks` judges I4, `accounts` I8 and the retries of I6.
Tokens from wrong KV would not be the oracle's, either: no two prompts of a row share their tokens,
and a row proves that the oracle would tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.faults.history import ENDINGS, LAST, NO_REQUEST, Usage

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from tests.faults.history import Answer, Event, History

# What may be said of a fault of the machinery. All are 503 or 504: the client may try again.
FAULT_CODES = frozenset({"node_lost", "kv_load_failed", "no_capacity", "deadline_exceeded"})
MAX_SILENCE_SECONDS = 30.0  # until who is not heard is lost, or nobody is left to ask
FREED_WITHIN_SECONDS = 5.0  # one, and what a busy machine adds


def violations(
    history: History,
    oracle: Mapping[int, Answer],
    *,
    allowed_codes: Collection[str] = FAULT_CODES,
    may_break: Collection[int] = (),
    may_err: Collection[int] | None = None,
) -> list[str]:
    """What is wrong with a history, in words; nothing when it holds.

    `oracle`: each request's answer in an undisturbed run. `may_break`: requests whose connection
    may break, because their gateway was killed. `may_err`: those that may end in an error at all;
    None: every one.
    """
    events = history.by_request()
    found = [
        f"request {number}: {problem}"
        for number, expected in oracle.items()
        for problem in _of_one(events.get(number, []), expected, allowed_codes, number in may_break)
    ]
    strangers = set(events) - set(oracle)
    found += [f"request {number}: not known to the oracle" for number in sorted(strangers)]
    found += [event.detail for event in history.events if event.kind == "contradiction"]
    found += silences(history)
    if may_err is not None:
        bystanders = history.erred() - set(may_err)
        found += [f"request {number}: erred, but touched no fault" for number in sorted(bystanders)]
    return found


def wrong_tokens(history: History, oracle: Mapping[int, Answer]) -> int:
    """How many requests got a token that is not the oracle's."""
    events = history.by_request()
    got = {number: _tokens(events.get(number, [])) for number in oracle}
    return sum(
        got[number] != expected.token_ids[: len(got[number])] for number, expected in oracle.items()
    )


def hung(history: History) -> int:
    """How many requests have no end."""
    return sum(
        not any(event.kind in LAST and event.kind != "hung" for event in events)
        for events in history.by_request().values()
    )


def silences(history: History, longest_seconds: float = MAX_SILENCE_SECONDS) -> list[str]:
    """For how long requests were open and no client heard anything, where that is too long."""
    found, num_open, heard_at = [], 0, 0.0
    for event in history.events:
        if event.request == NO_REQUEST:
            continue
        if num_open and event.at - heard_at > longest_seconds:
            found.append(f"nobody heard anything for {event.at - heard_at:.1f} s")
        num_open += (event.kind == "sent") - (event.kind in LAST)
        heard_at = event.at
    return found


def not_freed(history: History) -> list[str]:
    """Nodes that still had blocks of a client long after it had left; not of nodes that were
    disturbed themselves."""
    left = {f"ask-{e.request}": e.at for e in history.events if e.kind == "left"}
    faults = [event.detail for event in history.events if event.kind == "fault"]
    found = []
    for held in (event for event in history.events if event.kind == "held"):
        request, _, node = held.detail.partition(" ")
        if request not in left or any(node in fault for fault in faults):
            continue
        limit = max(held.at, left[request]) + FREED_WITHIN_SECONDS
        freed = (e.at for e in history.events if e.kind == "freed" and e.detail == held.detail)
        if not any(held.at <= at <= limit for at in freed):
            found.append(f"{node} kept blocks of {request} after its client had left")
    return found


def _of_one(
    events: Sequence[Event],
    expected: Answer,
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
    if tokens != expected.token_ids[: len(tokens)]:
        yield f"token {_first_difference(tokens, expected.token_ids)} is not the oracle's"
    for ending in endings:
        if ending.kind == "finished":
            yield from _of_finished(ending, events, len(tokens), expected, is_excused)
        elif ending.detail not in allowed_codes:
            yield f"ended with {ending.detail}"


def _of_finished(
    ending: Event,
    events: Sequence[Event],
    num_tokens: int,
    expected: Answer,
    is_excused: bool,
) -> Iterator[str]:
    """`is_excused`: its client has not heard the rest."""
    if num_tokens != len(expected.token_ids):
        yield f"finished with {num_tokens} of {len(expected.token_ids)} tokens"
    if ending.detail != expected.finish_reason:
        yield f"finished by {ending.detail}, not by {expected.finish_reason}"
    usages = [event.usage for event in events if event.usage is not None]
    if len(usages) > 1 or (not usages and not is_excused):
        yield f"{len(usages)} usages"
    for usage in usages:
        yield from _of_usage(usage, num_tokens, expected)


def _of_usage(usage: Usage, num_tokens: int, expected: Answer) -> Iterator[str]:
    if usage.prompt != expected.num_prompt_tokens:
        yield f"usage counts {usage.prompt} tokens of a prompt of {expected.num_prompt_tokens}"
    if usage.completion != num_tokens:
        yield f"usage counts {usage.completion} of {num_tokens} tokens"
    if usage.total != usage.prompt + usage.completion:
        yield f"usage adds {usage.prompt} and {usage.completion} up to {usage.total}"
    # The last token of a prompt is always computed.
    if not 0 <= usage.cached < usage.prompt:
        yield f"usage calls {usage.cached} tokens of a prompt of {usage.prompt} cached"


def _tokens(events: Sequence[Event]) -> tuple[int, ...]:
    return tuple(token for event in events for token in event.token_ids)


def _first_difference(tokens: Sequence[int], expected: Sequence[int]) -> int:
    same = (mine == theirs for mine, theirs in zip(tokens, expected, strict=False))
    return next((index for index, is_same in enumerate(same) if not is_same), len(expected))
