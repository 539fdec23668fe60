"""Pairs of nodes that must not exchange KV say so."""

from __future__ import annotations

import pytest

from cluster.errors import HandshakeMismatch
from kv_transfer.handshake import Compatibility
from kv_transfer.transports.ucx_lanes import carrier


def test_equal_nodes_fit() -> None:
    Compatibility(1, "layout").check(Compatibility(1, "layout"))


@pytest.mark.parametrize("theirs", [Compatibility(2, "layout"), Compatibility(1, "other")])
def test_nodes_that_differ_in_version_or_layout_do_not_fit(theirs: Compatibility) -> None:
    with pytest.raises(HandshakeMismatch) as caught:
        Compatibility(1, "layout").check(theirs)
    assert caught.value.reason == "layout_mismatch"


@pytest.mark.parametrize(
    ("lanes", "on_device", "expected"),
    [
        (("tcp", "cuda_ipc"), True, "cuda_ipc"),
        (("tcp", "cuda_ipc"), False, "tcp"),
        (("tcp", "rc_mlx5"), True, "rdma"),
        (("tcp", "sysv"), False, "shm"),
        (("tcp",), False, "tcp"),
        ((), False, "unknown"),
    ],
)
def test_the_fastest_lane_names_the_transport(
    lanes: tuple[str, ...], on_device: bool, expected: str
) -> None:
    assert carrier(lanes, on_device=on_device) == expected
