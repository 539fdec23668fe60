"""How fast KV could move between two devices. Run by `baton doctor --pairs`, `--to` and `--listen`.

    python -m baton.pair_probe SOURCE TARGET TLS    of this machine, as cuda:0 cuda:1 all
    python -m baton.pair_probe to DEVICE HOST PORT  another machine, that listens: to cpu db2 9300

Life of a probe
    1. A second process opens the transport that nodes use, on the target device, and listens.
    2. This one connects and sends messages as large as a node's frames, a few in flight at a time,
       as a node does; the other says when the last byte of a round has come.
    3. The plain copy between the same two is timed, both processes idle otherwise.
    4. One JSON line: transport, UCX's lanes, bytes per second of either. Or what failed.

Between two machines one runs `serve`, the other `measure_to`: the plain copy is then a socket's, to
a process whose port comes with the last answer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import multiprocessing
import statistics
import struct
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from baton.pair_plan import Plan
from baton.raw_copy import COPY_BYTES, PLAIN, REPEATS, RawReceiver, memory_rate, socket_rate
from cluster.errors import NodeUnavailable, ServingError
from kv_transfer.config import KVTransferConfig
from kv_transfer.failures import FailureReason
from kv_transfer.transports.choice import open_transport

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from kv_transfer.transports.base import Endpoint, Transport

START_SECONDS = 60.0  # of a process that loads torch
CONNECT_SECONDS = 20.0
ROUND_SECONDS = 20.0
NUM_ROUNDS = 6  # the first warms up
NUM_IN_FLIGHT = 4
PEER_BYTES = 1 << 30
_DATA, _ACK = 1, 2
_PORT = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class PairRate:
    """Rates are bytes per second."""

    transport: str
    lanes: tuple[str, ...]
    rate: float
    reference: str
    reference_rate: float


def measure(plan: Plan) -> PairRate:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_receive_all, args=(plan, theirs), daemon=True)
    child.start()
    try:
        transport, lanes, rate = asyncio.run(_send_all(plan, ours))
    finally:
        child.join(5)
        child.kill()
    reference, reference_rate = _reference(plan, transport)
    return PairRate(transport, lanes, rate, reference, reference_rate)


def measure_to(plan: Plan) -> PairRate:
    """To a machine where `serve` runs. Raises `ServingError`, `OSError` or `TimeoutError`."""
    transport, lanes, rate, raw_port = asyncio.run(_send_rounds(plan, plan.port))
    reference_rate = socket_rate((plan.host, raw_port))
    return PairRate(transport, lanes, rate, "plain socket", reference_rate)


def serve(plan: Plan) -> None:
    """Take probes, one after the other, until interrupted. Raises `ConfigError`."""
    asyncio.run(_serve(plan))


def _reference(plan: Plan, transport: str) -> tuple[str, float]:
    if plan.source != "cpu":
        return "peer copy", peer_rate(plan.source, plan.target)
    if transport == "tcp":
        return "plain socket", socket_rate()
    return "memory copy", memory_rate()


def _open(device: str, tls: str | None) -> Transport:
    """As a node does whose KV is there."""
    torch.set_num_threads(1)
    if device != "cpu":
        if (torch.device(device).index or 0) >= torch.cuda.device_count():
            raise NodeUnavailable(f"torch sees no {device} on this machine.")
        torch.cuda.set_device(device)
        torch.cuda.synchronize()
    config = KVTransferConfig(ucx_tls=tls, pairing_seconds=CONNECT_SECONDS)
    return open_transport(config, on_device=device != "cpu")


async def _send_all(plan: Plan, where: Connection) -> tuple[str, tuple[str, ...], float]:
    if not await asyncio.to_thread(where.poll, START_SECONDS):
        raise TimeoutError("the other process did not listen")
    return (await _send_rounds(plan, where.recv()))[:3]


async def _send_rounds(plan: Plan, port: int) -> tuple[str, tuple[str, ...], float, int]:
    """Transport, lanes, rate, and the port of the plain socket's receiver, if there is one."""
    transport = _open(plan.source, plan.tls)
    try:
        endpoint = await transport.connect(plan.host, port, 1)
    except ServingError as error:
        await transport.close()
        if error.reason != FailureReason.LINK_LOST.value:
            raise
        raise NodeUnavailable("nobody listens there, or nobody that can be reached.") from error
    try:
        slots = torch.ones((NUM_IN_FLIGHT, plan.message_bytes), dtype=torch.uint8)
        slots = slots.to(plan.source)
        ack = torch.zeros(_PORT.size, dtype=torch.uint8)
        seconds = []
        for _ in range(NUM_ROUNDS):
            began = time.perf_counter()
            async with asyncio.timeout(ROUND_SECONDS):
                await _stream(plan, endpoint, slots, sends=True)
                await endpoint.recv(ack, _ACK)
            seconds.append(time.perf_counter() - began)
        rate = plan.num_messages * plan.message_bytes / statistics.median(seconds[1:])
        raw_port = _PORT.unpack(ack.numpy().tobytes())[0]
        return endpoint.transport_name, endpoint.lanes, rate, raw_port
    finally:
        await endpoint.close()
        await transport.close()


def _receive_all(plan: Plan, where: Connection) -> None:
    asyncio.run(_receive_rounds(plan, where))


async def _receive_rounds(plan: Plan, where: Connection) -> None:
    transport = _open(plan.target, plan.tls)
    connected: asyncio.Future[Endpoint] = asyncio.get_running_loop().create_future()
    where.send(await transport.listen("127.0.0.1", 0, lambda _, end: connected.set_result(end)))
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            endpoint = await connected
        await _take(plan, endpoint, 0)
    finally:
        await transport.close()


async def _serve(plan: Plan) -> None:
    transport = _open(plan.target, plan.tls)
    waiting: asyncio.Queue[Endpoint] = asyncio.Queue()
    port = await transport.listen(plan.host, plan.port, lambda _, end: waiting.put_nowait(end))
    print(f"waiting for `baton doctor --to HOST:{port}`; Ctrl-C ends it", file=sys.stderr)
    try:
        while True:
            endpoint = await waiting.get()
            raw = await asyncio.to_thread(RawReceiver, PLAIN, COPY_BYTES, plan.host)
            await _take(plan, endpoint, raw.port)
            await asyncio.to_thread(raw.close)
    finally:
        await transport.close()


async def _take(plan: Plan, endpoint: Endpoint, raw_port: int) -> None:
    """All rounds of one probe. A peer that breaks off ends them; it says why."""
    slots = torch.empty((NUM_IN_FLIGHT, plan.message_bytes), dtype=torch.uint8).to(plan.target)
    answer = np.frombuffer(_PORT.pack(raw_port), dtype=np.uint8).copy()
    ack = torch.from_numpy(answer)
    try:
        for _ in range(NUM_ROUNDS):
            async with asyncio.timeout(ROUND_SECONDS):
                await _stream(plan, endpoint, slots, sends=False)
                await endpoint.send(ack, _ACK)
        await asyncio.sleep(0.1)  # the other side closes first
    except (ServingError, TimeoutError):
        pass  # the sender, which speaks for both, says what happened
    finally:
        await endpoint.close()


async def _stream(plan: Plan, endpoint: Endpoint, slots: torch.Tensor, *, sends: bool) -> None:
    """A round of messages; a slot is used again when its last message has ended."""
    posted: list[asyncio.Future[None]] = []
    for index in range(plan.num_messages):
        if index >= NUM_IN_FLIGHT:
            await posted[index - NUM_IN_FLIGHT]
        slot = slots[index % NUM_IN_FLIGHT]
        posted.append(endpoint.send(slot, _DATA) if sends else endpoint.recv(slot, _DATA))
    await asyncio.gather(*posted)


def peer_rate(source: str, target: str) -> float:
    """Bytes per second of one copy from a GPU to another, as the driver makes it."""
    one = torch.empty(PEER_BYTES, dtype=torch.uint8, device=source)
    other = torch.empty(PEER_BYTES, dtype=torch.uint8, device=target)
    seconds = []
    for _ in range(REPEATS):
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        began = time.perf_counter()
        other.copy_(one, non_blocking=True)
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        seconds.append(time.perf_counter() - began)
    return PEER_BYTES / statistics.median(seconds)


def main(arguments: list[str]) -> None:
    try:
        facts = dataclasses.asdict(_asked(arguments))
    except (ServingError, OSError) as error:  # of which the asker has a row
        facts = {"failed": str(error) or type(error).__name__}
    print(json.dumps(facts))


def _asked(arguments: list[str]) -> PairRate:
    if arguments[0] == "to":
        device, host, port = arguments[1:]
        return measure_to(Plan(device, device, None, host, int(port)))
    source, target, tls = arguments
    return measure(Plan(source, target, None if tls == "all" else tls))


if __name__ == "__main__":
    main(sys.argv[1:])
