"""A decode node computes lost KV within bounds, so that it stays a decode node."""

from __future__ import annotations

from decode_node.recompute import SAVED_SECONDS, RecomputeBudget


def budget(*, max_concurrent: int = 2, rate: float = 10.0) -> RecomputeBudget:
    return RecomputeBudget(max_concurrent=max_concurrent, tokens_per_second=rate, now=0.0)


def test_only_so_many_run_at_a_time() -> None:
    one = budget()
    assert one.admit("a", 1, 0.0)
    assert one.admit("b", 1, 0.0)
    assert not one.admit("c", 1, 0.0)
    one.end("a")
    one.end("a")
    assert one.admit("c", 1, 0.0)


def test_tokens_are_bounded_and_come_back_with_time() -> None:
    one = budget(max_concurrent=9)
    assert one.admit("a", 60, 0.0)
    assert not one.admit("b", 60, 0.0)
    assert one.admit("c", 40, 0.0)
    assert not one.admit("d", 1, 0.0)
    assert one.admit("d", 10, 1.5)


def test_a_prompt_longer_than_the_bucket_runs_alone_and_is_paid_back() -> None:
    one = budget()
    assert one.admit("long", 1000, 0.0)
    one.end("long")
    assert not one.admit("a", 1, 80.0)
    assert one.admit("a", 1, 91.0)


def test_what_is_saved_is_bounded() -> None:
    one = budget(max_concurrent=1)
    assert one.admit("a", int(SAVED_SECONDS * 10), 1e6)
    one.end("a")
    assert not one.admit("b", 1, 1e6)


def test_none_allowed_means_none() -> None:
    assert not budget(max_concurrent=0).admit("a", 1, 0.0)
    assert not budget(rate=0.0).admit("a", 1, 5.0)
