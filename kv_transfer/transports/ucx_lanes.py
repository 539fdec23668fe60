"""Which transports UCX chose for an endpoint. ucxx does not tell, so UCP is asked directly."""

from __future__ import annotations

import ctypes
import functools
import re

_MAX_LANES = 32
_FIELD_TRANSPORTS = 1 << 3  # UCP_EP_ATTR_FIELD_TRANSPORTS
_NAME_BYTES = 32  # UCP_ENTITY_NAME_MAX
_SOCKADDR_WORDS = 16  # sizeof(struct sockaddr_storage) / 8

RDMA = ("rc", "dc", "ud", "srd")
SHARED_MEMORY = ("sysv", "posix", "cma", "knem", "xpmem")


class _Entry(ctypes.Structure):
    _fields_ = [("transport_name", ctypes.c_char_p), ("device_name", ctypes.c_char_p)]


class _Transports(ctypes.Structure):
    _fields_ = [
        ("entries", ctypes.POINTER(_Entry)),
        ("num_entries", ctypes.c_uint),
        ("entry_size", ctypes.c_size_t),
    ]


class _EndpointAttributes(ctypes.Structure):
    """`ucp_ep_attr_t`."""

    _fields_ = [
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * _NAME_BYTES),
        ("local_sockaddr", ctypes.c_uint64 * _SOCKADDR_WORDS),
        ("remote_sockaddr", ctypes.c_uint64 * _SOCKADDR_WORDS),
        ("transports", _Transports),
        ("user_data", ctypes.c_void_p),
    ]


def lanes_of(endpoint_handle: int) -> tuple[str, ...]:
    """UCX's names of the transports under an endpoint; empty when UCX does not say."""
    ucp = _ucp()
    if ucp is None:
        return ()
    entries = (_Entry * _MAX_LANES)()
    attributes = _EndpointAttributes(field_mask=_FIELD_TRANSPORTS)
    attributes.transports = _Transports(entries, _MAX_LANES, ctypes.sizeof(_Entry))
    status = ucp.ucp_ep_query(ctypes.c_void_p(endpoint_handle), ctypes.byref(attributes))
    if status != 0:
        return ()
    found = entries[: attributes.transports.num_entries]
    return tuple(dict.fromkeys((entry.transport_name or b"").decode() for entry in found))


def resources_of(context_info: str) -> tuple[str, ...]:
    """The transports in what UCX prints of a context, which is the only way it tells them."""
    found = re.findall(r"resource \d+ .*-- (\w+)/", context_info)
    return tuple(dict.fromkeys(found))


@functools.cache
def _ucp() -> ctypes.CDLL | None:
    """UCP as ucxx has loaded it."""
    try:
        return ctypes.CDLL("libucp.so.0")
    except OSError:
        return None


def carrier(lanes: tuple[str, ...], *, on_device: bool) -> str:
    """The transport that UCX prefers for large payloads among those connected."""
    if on_device and "cuda_ipc" in lanes:
        return "cuda_ipc"
    if any(lane.split("_")[0] in RDMA for lane in lanes):
        return "rdma"
    if any(lane in SHARED_MEMORY for lane in lanes):
        return "shm"
    return "tcp" if "tcp" in lanes else "unknown"
