"""Checks that load torch or UCX. Run by `baton doctor` in a process of their own.

Prints one JSON line: a list of [subject, verdict, detail]; asked for `gpus`, their number.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy

from cluster.errors import ConfigError
from kv_transfer.transports.ucx import find_transports
from kv_transfer.transports.ucx_lanes import RDMA

if TYPE_CHECKING:
    from collections.abc import Callable

Row = tuple[str, str, str]
PROBE_BYTES = 1 << 20


def _load(package: str) -> Any:
    """The package, or the `ImportError`: a gateway needs neither. A probe loads only what it is
    about, since loading may be what fails."""
    try:
        return import_module(package)
    except ImportError as error:
        return error


def _can_run_nodes() -> bool:
    return find_spec("torch") is not None


def _why_not_loaded(error: ImportError) -> str:
    """What is installed can fail to load too: its libraries are missing, or too old for it."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"installed, but cannot be loaded: {error}"


def probe_torch() -> list[Row]:
    torch = _load("torch")
    if isinstance(torch, ImportError):
        detail = f"{_why_not_loaded(torch)}; this machine can run a gateway only"
        return [("torch", "warning", detail)]
    rows: list[Row] = [("torch", "ok", torch.__version__)]
    if not torch.cuda.is_available():
        return [*rows, ("GPU", "ok", "none; nodes run on the CPU")]
    count = torch.cuda.device_count()
    for index in range(count):
        facts = torch.cuda.get_device_properties(index)
        memory = facts.total_memory / (1 << 30)
        rows.append((f"GPU {index}", "ok", f"{facts.name}, {memory:.0f} GiB"))
    for one in range(count):
        for other in range(count):
            if one < other and not torch.cuda.can_device_access_peer(one, other):
                detail = "no peer access: KV between them goes through the host"
                rows.append((f"GPU {one}-{other}", "warning", detail))
    return rows


def probe_ucx() -> list[Row]:
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
    ucxx = _load("ucxx")
    if isinstance(ucxx, ImportError):
        detail = f"{_why_not_loaded(ucxx)}: `pip install 'baton-serve[cuda13]'`"
        return [("UCX", "problem" if _can_run_nodes() else "warning", detail)]
    release = next((v for v in map(_version, ("ucxx-cu13", "ucxx-cu12")) if v), "")
    detail = f"ucxx {release}, UCX {'.'.join(str(n) for n in ucxx.get_ucx_version())}"
    try:
        transports = _transports_found()
    except ConfigError as error:
        return [("UCX", "problem", error.message)]
    asyncio.run(_round_trip(ucxx))
    return [("UCX", "ok", f"{detail}; a message to itself came back right"), transports]


def _transports_found() -> Row:
    """What UCX can use here, and what one would expect beside it."""
    found = [name for name in find_transports() if name != "self"]
    detail = ", ".join(found)
    if not any(name.startswith(RDMA) for name in found):
        detail += "; no RDMA (that of the libucx wheels is built without verbs)"
    if _has_gpus() and "cuda_ipc" not in found:
        missing = "no cuda_ipc, so no NVLink: look at UCX_TLS, and at the driver in this container"
        return ("UCX transports", "warning", f"{detail}; {missing}")
    return ("UCX transports", "ok", detail)


def count_gpus() -> int:
    """As torch sees them; 0 without torch."""
    torch = _load("torch")
    return 0 if isinstance(torch, ImportError) else int(torch.cuda.device_count())


def _has_gpus() -> bool:
    torch = _load("torch")
    return not isinstance(torch, ImportError) and bool(torch.cuda.is_available())


async def _round_trip(ucxx: Any) -> None:
    """One message through a listener and an endpoint of this process. Raises when it differs."""
    ucxx.init(progress_mode="blocking")
    sent = numpy.random.default_rng(0).integers(0, 256, PROBE_BYTES, dtype=numpy.uint8)
    received = numpy.empty_like(sent)
    arrived = asyncio.Event()

    async def receive(endpoint: Any) -> None:
        await endpoint.recv(received)
        await endpoint.close()
        arrived.set()

    listener = ucxx.create_listener(receive, 0)
    endpoint = await ucxx.create_endpoint("127.0.0.1", listener.port)
    await endpoint.send(sent)
    await arrived.wait()
    await endpoint.close()
    if not (sent == received).all():
        raise RuntimeError("UCX delivered other bytes than were sent")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


PROBES: dict[str, Callable[[], object]] = {
    "torch": probe_torch,
    "ucx": probe_ucx,
    "gpus": count_gpus,
}

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]]()))
