"""A transport that the operator requires, and that is not there, is an error that says so."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
import torch

from cluster.errors import ConfigError, TransferFailed
from kv_transfer.agent import TransferAgent
from kv_transfer.required_transport import check_in_use, check_possible
from kv_transfer.transports.ucx_lanes import resources_of
from tests.kv_child import OPTIONS, data_transport
from tests.kv_twins import decode_side, make_config, make_request, prefill_side, until


@pytest.mark.parametrize(
    ("required", "in_use", "is_fine"),
    [
        ("any", "tcp", True),
        ("any", "unknown", True),
        ("nvlink", "cuda_ipc", True),
        ("nvlink", "rdma", False),
        ("rdma", "rdma", True),
        ("rdma", "tcp", False),
        ("shm", "shm", True),
        ("shm", "tcp", False),
        ("tcp", "tcp", True),
        ("tcp", "unknown", False),
    ],
)
def test_a_fall_back_to_a_refused_transport_is_an_error(
    required: str, in_use: str, is_fine: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if is_fine:
        check_in_use(required, in_use, ("x",), on_device=False)
        return
    with pytest.raises(TransferFailed) as caught:
        check_in_use(required, in_use, ("x", "y"), on_device=False)
    assert caught.value.reason == "transport_refused"
    assert in_use in caught.value.message
    assert required in caught.value.message
    assert f"{in_use} (UCX: x, y)" in caplog.text, "the log names what was found"


@pytest.mark.parametrize(
    ("in_use", "on_device", "warns"),
    [("tcp", True, True), ("cuda_ipc", True, False), ("tcp", False, False)],
)
def test_kv_of_gpus_that_goes_through_host_memory_is_worth_a_warning(
    in_use: str, on_device: bool, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_in_use("any", in_use, (in_use,), on_device=on_device)
    assert ("through host memory" in caplog.text) == warns


@pytest.mark.parametrize(
    ("required", "available", "on_device", "is_possible"),
    [
        ("any", {"tcp"}, False, True),
        ("nvlink", {"tcp", "cuda_copy", "cuda_ipc"}, True, True),
        ("nvlink", {"tcp", "cuda_copy", "cuda_ipc"}, False, False),
        ("nvlink", {"tcp", "cuda_copy"}, True, False),
        ("rdma", {"tcp", "rc_mlx5"}, False, True),
        ("rdma", {"tcp"}, True, False),
        ("shm", {"tcp", "posix"}, False, True),
        ("shm", {"tcp"}, False, False),
        ("rdma", (), False, True),  # UCX does not say: the pairing will show
    ],
)
def test_a_node_does_not_start_where_the_required_transport_is_not_there(
    required: str, available: set[str], on_device: bool, is_possible: bool
) -> None:
    if is_possible:
        check_possible(required, available, on_device=on_device)
        return
    with pytest.raises(ConfigError) as caught:
        check_possible(required, available, on_device=on_device)
    assert caught.value.param == "require_transport"
    assert all(name in caught.value.message for name in available)


def test_the_transports_of_a_context_are_read_from_what_it_prints() -> None:
    text = """#
#     component 1  :  tcp
#      resource 0  :  md 0  dev 0  flags -- self/memory
#      resource 1  :  md 1  dev 1  flags -- tcp/eth0
#      resource 2  :  md 1  dev 2  flags -- tcp/lo
#      resource 3  :  md 4  dev 3  flags -- rc_mlx5/mlx5_0:1
"""
    assert resources_of(text) == ("self", "tcp", "rc_mlx5")


@pytest.mark.slow
@pytest.mark.parametrize("required", ["nvlink", "rdma"])
def test_ucx_itself_says_that_this_machine_has_no_such_transport(required: Any) -> None:
    async def main() -> None:
        pool = torch.zeros((2, 4, 4096), dtype=torch.uint8)
        with pytest.raises(ConfigError, match=r"UCX found: .*tcp"):
            TransferAgent.create((pool,), make_config(require_transport=required))

    asyncio.run(main())


@pytest.mark.slow
def test_a_pair_that_ucx_connects_otherwise_is_refused_and_counted() -> None:
    async def main() -> None:
        async with (
            decode_side(data_transport("tcp"), **OPTIONS) as decode,  # type: ignore[arg-type]
            prefill_side(data_transport("tcp"), require_transport="shm", **OPTIONS) as prefill,  # type: ignore[arg-type]
        ):
            request = make_request(32)
            prefill.hand_off(decode, request)
            await until(lambda: prefill.owner.of(request.sequence_id) == ["failed", "free"])
            error = prefill.owner.errors[request.sequence_id]
            assert error.reason == "transport_refused"
            assert "tcp" in error.message
            assert prefill.sender.agent.stats.handshakes_refused == 1
            assert prefill.sender.agent.transports_in_use == ()

    asyncio.run(main())
