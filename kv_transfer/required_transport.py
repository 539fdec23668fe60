"""`--require-transport`: a fall to a slower transport is an error that says what was found.

1. `check_possible`, at the start: a kind that UCX has no transport for on this machine keeps the
   node from starting.
2. `check_in_use`, at each pairing: the pair is refused when UCX has connected it by another kind.

What carries a pair is in the log of both nodes and in `/metrics`, whether or not it is required.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import ConfigError, TransferFailed
from kv_transfer.failures import FailureReason
from kv_transfer.transports.ucx_lanes import RDMA, SHARED_MEMORY

if TYPE_CHECKING:
    from collections.abc import Collection

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Kind:
    """`carrier` is what an endpoint of this kind calls itself. UCX's names of its transports
    begin with one of `prefixes`."""

    carrier: str
    prefixes: tuple[str, ...]
    what_to_check: str


_KINDS = {
    "nvlink": _Kind(
        "cuda_ipc",
        ("cuda_ipc",),
        "Both nodes must keep their KV on GPUs of one machine that reach each other (`nvidia-smi "
        "topo -m`, `baton doctor --pairs`); neither --ucx-tls nor UCX_TLS may leave out cuda_copy "
        "and cuda_ipc",
    ),
    "rdma": _Kind(
        "rdma",
        RDMA,
        "`ibv_devinfo` must show an active port on both machines; UCX must be built with verbs, as "
        "that of the libucx wheels is not (install one, and set "
        "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=1); --ucx-tls, UCX_TLS and UCX_NET_DEVICES must not "
        "leave the device out",
    ),
    "shm": _Kind(
        "shm",
        SHARED_MEMORY,
        "Both nodes must be on one machine, share its /dev/shm, and have --ucx-tls sm,tcp",
    ),
    "tcp": _Kind("tcp", ("tcp",), "--ucx-tls or UCX_TLS must not leave out tcp"),
}


def check_possible(required: str, available: Collection[str], *, on_device: bool) -> None:
    """`available`: UCX's names of the transports it has found here; empty when it does not say.
    Raises `ConfigError` when none of them is of the required kind."""
    kind = _KINDS.get(required)
    if kind is None or not available:
        return
    is_there = any(name.startswith(kind.prefixes) for name in available)
    if is_there and (on_device or required != "nvlink"):
        return
    found = ", ".join(sorted(available)) + ("" if on_device else "; the KV is in host memory")
    raise ConfigError(
        f"--require-transport {required}: this node cannot use it. UCX found: {found}. "
        f"{kind.what_to_check}.",
        param="require_transport",
    )


def check_in_use(required: str, in_use: str, lanes: Collection[str], *, on_device: bool) -> None:
    """`lanes`: UCX's names of the transports under the connection. Raises `TransferFailed` when it
    is of another kind than the operator requires."""
    kind = _KINDS.get(required)
    found = f"{in_use} (UCX: {', '.join(lanes) or 'unknown'})"
    if kind is not None and in_use != kind.carrier:
        logger.error(
            "--require-transport %s, but UCX connects this pair over %s. %s.",
            required, found, kind.what_to_check,
        )  # fmt: skip
        raise TransferFailed(
            f"The nodes are connected over {in_use}, and {required} is required.",
            reason=FailureReason.TRANSPORT_REFUSED.value,
        )
    if kind is None and on_device and in_use in ("tcp", "shm", "unknown"):
        logger.warning(
            "KV goes from GPU to GPU over %s, through host memory. If these GPUs have NVLink or "
            "RDMA between them: %s. Or: %s. --require-transport makes this an error.",
            found, _KINDS["nvlink"].what_to_check, _KINDS["rdma"].what_to_check,
        )  # fmt: skip
