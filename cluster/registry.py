"""The registry of nodes in Redis: who is there, at which address, in which state.

Life of an entry
    1. `announce`: a node writes itself under its name, taking the place of an earlier
       incarnation.
    2. `heartbeat`, each second: the entry is written again with fresh state and load, and lives
       for another TTL. One that vanished (Redis came back empty) is thereby restored, and so is
       one in whose place an earlier incarnation's is back (Redis has lost writes). One that
       belongs to another incarnation is left alone: this process has been replaced.
    3. `withdraw`, or the end of the TTL, removes it.

Keys: `baton:nodes`, the set of names, and `baton:node:<name>`, one JSON document of at most
4 KiB. Readers believe nothing: a malformed entry is skipped and counted.
"""

from __future__ import annotations

import contextlib
import json
import re
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, cast

from redis.exceptions import RedisError, ResponseError, WatchError

from cluster.node import (
    HOST,
    NODE_NAME,
    Incarnation,
    NodeId,
    NodeInfo,
    NodeLoad,
    NodeName,
    NodeRole,
    NodeState,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import redis.asyncio as aioredis

    from cluster.redis_client import Store

HEARTBEAT_SECONDS = 1.0
TTL_SECONDS = 5.0
MAX_ENTRY_BYTES = 4096
MAX_NODES = 1024
MAX_TRIES = 3  # of one heartbeat

_FORMAT = 1
_NAMES_KEY = "baton:nodes"
_ADDRESS = re.compile(HOST.pattern + ":[0-9]{1,5}")
_MAX_COUNT = 2**53
_LOAD_FIELDS = tuple(NodeLoad.__dataclass_fields__)


class Heartbeat(Enum):
    RENEWED = auto()
    RESTORED = auto()  # the entry had vanished; so may have whatever else this node had stored
    REPLACED = auto()  # another incarnation owns the name; this process must stop serving


class PoisonedEntry(ValueError):
    """A registry entry that no node of this version would have written."""


class Registry:
    """Reads and writes entries; raises `StoreUnavailable` when Redis does not serve."""

    def __init__(self, store: Store, *, ttl_seconds: float = TTL_SECONDS) -> None:
        self._store = store
        self._ttl_ms = int(ttl_seconds * 1000)
        self._predecessors: set[NodeId | None] = {None}  # those whose place was taken here

    async def announce(self, info: NodeInfo) -> None:
        """Write the entry, whoever had the name before, and forget names without an entry."""
        entry = encode_entry(info)

        async def write(client: aioredis.Redis) -> None:
            self._predecessors |= {await _owner(client, info.id.name)} - {info.id}
            names, documents = await _read_documents(client)
            dead = [n for n, document in zip(names, documents, strict=True) if document == b""]
            async with client.pipeline(transaction=True) as pipe:
                if dead:
                    pipe.srem(_NAMES_KEY, *dead)
                self._queue_write(pipe, info.id.name, entry)
                await _execute(pipe, client)

        await self._store.call(write)

    async def heartbeat(self, info: NodeInfo) -> Heartbeat:
        """Renew the entry unless another incarnation has it."""
        entry = encode_entry(info)

        async def renew(client: aioredis.Redis) -> Heartbeat:
            for _ in range(MAX_TRIES):
                with contextlib.suppress(WatchError):  # it was written, or it expired, just now
                    return await self._renew_once(client, info, entry)
            return Heartbeat.RESTORED  # for all that is known; the next heartbeat tries again

        return await self._store.call(renew)

    async def _renew_once(self, client: aioredis.Redis, info: NodeInfo, entry: bytes) -> Heartbeat:
        """Raises `WatchError` when the entry changed between reading and writing. That alone says
        nothing of another owner: a Redis that stood still expires entries while they are read."""
        async with client.pipeline(transaction=True) as pipe:
            await pipe.watch(_key(info.id.name))
            owner = await _owner(pipe, info.id.name)
            if owner != info.id and owner not in self._predecessors:
                return Heartbeat.REPLACED
            pipe.multi()  # type: ignore[no-untyped-call]
            self._queue_write(pipe, info.id.name, entry)
            await _execute(pipe, client)
        return Heartbeat.RENEWED if owner == info.id else Heartbeat.RESTORED

    async def withdraw(self, node: NodeId) -> None:
        """Remove the entry if it is still this incarnation's."""

        async def remove(client: aioredis.Redis) -> None:
            async with client.pipeline(transaction=True) as pipe:
                await pipe.watch(_key(node.name))
                if await _owner(pipe, node.name) != node:
                    return
                pipe.multi()  # type: ignore[no-untyped-call]
                pipe.delete(_key(node.name))
                pipe.srem(_NAMES_KEY, node.name)
                try:
                    await pipe.execute()
                except WatchError:
                    return  # a new incarnation announced itself meanwhile

        await self._store.call(remove)

    async def nodes(self) -> list[NodeInfo]:
        """All well-formed entries, by name. Malformed ones are skipped and counted."""
        names, documents = await self._store.call(_read_documents)
        found: list[NodeInfo] = []
        for name, document in zip(names, documents, strict=True):
            if document == b"":
                continue
            try:
                found.append(_decode_named(name, document))
            except PoisonedEntry:
                self._store.metrics.poisoned.labels(self._store.name).inc()
        return sorted(found, key=lambda info: info.id.name)

    def _queue_write(self, pipe: Any, name: str, entry: bytes) -> None:
        pipe.set(_key(name), entry, px=self._ttl_ms)
        pipe.sadd(_NAMES_KEY, name)


async def _read_documents(client: aioredis.Redis) -> tuple[list[bytes], list[Any]]:
    """Names, and their documents as far as an honest one can reach; b"" where there is none.

    Two round trips. The number of names and the bytes per document are bounded here, because
    what is stored may not be.
    """
    try:
        names = cast("list[bytes]", await client.srandmember(_NAMES_KEY, MAX_NODES))
    except RedisError as error:
        if not _is_wrong_type(error):
            raise
        names = []
    async with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.getrange(b"baton:node:" + name, 0, MAX_ENTRY_BYTES)
        documents = await pipe.execute(raise_on_error=False)
    return names, documents


async def _owner(pipe: Any, name: str) -> NodeId | None:
    """Who the entry says it is; None when there is none, or none that makes sense."""
    try:
        document = await pipe.getrange(_key(name), 0, MAX_ENTRY_BYTES)
        return _decode_named(name.encode(), document).id
    except PoisonedEntry:
        return None
    except RedisError as error:
        if _is_wrong_type(error):
            return None
        raise


async def _execute(pipe: Any, client: aioredis.Redis) -> None:
    """The entry is written in any case. What another program has put where the names belong goes:
    the next heartbeat of each node adds its own."""
    try:
        await pipe.execute()
    except ResponseError as error:
        if not _is_wrong_type(error):
            raise
        await client.delete(_NAMES_KEY)


def _is_wrong_type(error: RedisError) -> bool:
    return "WRONGTYPE" in str(error)


def _key(name: str) -> str:
    return f"baton:node:{name}"


def encode_entry(info: NodeInfo) -> bytes:
    """The JSON document of an entry; `ValueError` when it would not be accepted back."""
    load = {name: getattr(info.load, name) for name in _LOAD_FIELDS}
    document = {
        "format": _FORMAT,
        "name": info.id.name,
        "incarnation": info.id.incarnation,
        "role": info.role.value,
        "state": info.state.value,
        "grpc_address": info.grpc_address,
        "metrics_address": info.metrics_address,
        "model_name": info.model_name,
        "compatibility_hash": info.compatibility_hash,
        "block_size": info.block_size,
        "max_model_len": info.max_model_len,
        "transports": list(info.transports),
        "fetches_prefixes": info.fetches_prefixes,
        "load": load,
    }
    entry = json.dumps(document, separators=(",", ":")).encode()
    decode_entry(entry)
    return entry


def decode_entry(entry: bytes) -> NodeInfo:
    """The node an entry describes, or `PoisonedEntry`."""
    if len(entry) > MAX_ENTRY_BYTES:
        raise PoisonedEntry("The entry is too long.")
    try:
        document = json.loads(entry)
    except (ValueError, RecursionError) as error:
        raise PoisonedEntry("The entry is not JSON.") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise PoisonedEntry("The entry has another format.")
    try:
        role, state = NodeRole(str(document.get("role"))), NodeState(str(document.get("state")))
    except ValueError as error:
        raise PoisonedEntry("role or state is unknown.") from error
    name = NodeName(_matching(document, "name", NODE_NAME))
    return NodeInfo(
        id=NodeId(name, Incarnation(_integer(document, "incarnation", 1, 2**63 - 1))),
        role=role,
        state=state,
        grpc_address=_matching(document, "grpc_address", _ADDRESS),
        metrics_address=_matching(document, "metrics_address", _ADDRESS, may_be_empty=True),
        model_name=_text(document.get("model_name"), "model_name"),
        compatibility_hash=_text(document.get("compatibility_hash"), "compatibility_hash"),
        block_size=_integer(document, "block_size", 1, 2**20),
        max_model_len=_integer(document, "max_model_len", 1, _MAX_COUNT),
        transports=tuple(_text(t, "transports") for t in _list(document.get("transports"))),
        fetches_prefixes=document.get("fetches_prefixes") is True,
        load=_decode_load(document.get("load")),
    )


def _decode_named(name: bytes, document: Any) -> NodeInfo:
    if not isinstance(document, bytes):
        raise PoisonedEntry("The entry has another type.")
    info = decode_entry(document)
    if info.id.name.encode() != name:
        raise PoisonedEntry("The entry is under another name.")
    return info


def _decode_load(load: object) -> NodeLoad:
    if not isinstance(load, dict):
        raise PoisonedEntry("load is missing.")
    counts = {name: _integer(load, name, 0, _MAX_COUNT) for name in _LOAD_FIELDS if name in load}
    return NodeLoad(**counts)


def _integer(document: dict[str, Any], field: str, low: int, high: int) -> int:
    value = document.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise PoisonedEntry(f"{field} is not an integer in range.")
    return value


def _text(value: object, field: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 256 or not value.isprintable():
        raise PoisonedEntry(f"{field} is not a short printable text.")
    return value


def _matching(
    document: dict[str, Any], field: str, pattern: re.Pattern[str], *, may_be_empty: bool = False
) -> str:
    value = document.get(field)
    if may_be_empty and value == "":
        return ""
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise PoisonedEntry(f"{field} is malformed.")
    return value


def _list(value: object) -> Sequence[object]:
    if not isinstance(value, list) or len(value) > 16:
        raise PoisonedEntry("transports is not a short list.")
    return value
