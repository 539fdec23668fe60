"""Layers leave in groups large enough for the wire, and the last one leaves alone."""

from __future__ import annotations

import pytest

from prefill_node.layer_groups import group_ends


@pytest.mark.parametrize(
    ("layer_bytes", "expected"),
    [
        (100, {1, 2, 3, 4, 5, 6}),
        (60, {2, 4, 5, 6}),
        (40, {3, 5, 6}),
        (34, {3, 5, 6}),
        (33, set()),
        (0, set()),
    ],
)
def test_groups_hold_what_a_message_should_and_the_last_layer_goes_alone(
    layer_bytes: int, expected: set[int]
) -> None:
    assert group_ends(6, layer_bytes, 100) == expected


def test_one_layer_is_one_group() -> None:
    assert group_ends(1, 500, 100) == {1}
