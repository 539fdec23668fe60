"""`python -m benchmarks.dead_peers`: what a peer that is killed leaves behind on its GPU.

    1. This process receives on one GPU. A process with staging memory on another connects and
       sends until it is killed, in the middle of a message.
    2. When the connection has ended here and is closed, the memory in use on both GPUs is read.
    3. Again, as often as asked. Memory that is still in use after the last one, beyond what was
       before the first, belongs to the dead.

Beside it the rate of each peer, so that a cure can be priced: UCX_CUDA_IPC_CACHE=n in front.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import time
from typing import TYPE_CHECKING

import torch
import uvloop

from cluster.errors import ServingError
from kv_transfer.transports.ucx import UcxTransport

if TYPE_CHECKING:
    from kv_transfer.transports.base import Endpoint

MIB = 1 << 20
NUM_SLOTS = 8
CONNECT_SECONDS = 30.0


def open_transport(device: str) -> UcxTransport:
    is_gpu = device != "cpu"
    if is_gpu:
        torch.cuda.set_device(device)
        torch.cuda.synchronize()
    return UcxTransport(ucx_tls=None, moves_device_memory=is_gpu, connect_seconds=CONNECT_SECONDS)


def send_until_killed(device: str, port: int, slot_bytes: int, tag: int) -> None:
    async def main() -> None:
        transport = open_transport(device)
        endpoint = await transport.connect("127.0.0.1", port, 1)
        slots = torch.ones((NUM_SLOTS, slot_bytes), dtype=torch.uint8).to(device)
        posted: list[asyncio.Future[None]] = []
        while True:
            posted.append(endpoint.send(slots[len(posted) % NUM_SLOTS], tag))
            if len(posted) >= 4:
                await posted[-4]

    uvloop.run(main())


def used_mib(device: str) -> float:
    """In use on the whole GPU, by whatever process."""
    if device == "cpu":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / MIB


async def receive_from_one(
    arguments: argparse.Namespace,
    port: int,
    endpoints: asyncio.Queue[Endpoint],
    slot: torch.Tensor,
    tag: int,
) -> tuple[str, float]:
    """The transport of one peer and its rate; it is dead and its connection closed. `tag` is the
    peer's own: a message that the last one announced and never sent must match nothing."""
    context = multiprocessing.get_context("spawn")
    peer = context.Process(
        target=send_until_killed, args=(arguments.source, port, slot.numel(), tag), daemon=True
    )
    peer.start()
    endpoint = await asyncio.wait_for(endpoints.get(), CONNECT_SECONDS)
    closed = asyncio.Event()
    endpoint.on_close(closed.set)
    name, began = "", 0.0
    for index in range(arguments.messages):
        if index == 4:  # those before it open mappings
            name, began = endpoint.transport_name, time.perf_counter()
        await endpoint.recv(slot, tag)
    rate = (arguments.messages - 4) * slot.numel() / (time.perf_counter() - began)
    last = endpoint.recv(slot, tag)
    peer.kill()
    await asyncio.to_thread(peer.join)
    await asyncio.wait_for(closed.wait(), CONNECT_SECONDS)
    await endpoint.close()
    with contextlib.suppress(ServingError):  # unless its last message had arrived before
        await last
    return name, rate


async def run(arguments: argparse.Namespace) -> None:
    transport = open_transport(arguments.target)
    endpoints: asyncio.Queue[Endpoint] = asyncio.Queue()
    port = await transport.listen("127.0.0.1", 0, lambda _, end: endpoints.put_nowait(end))
    slot = torch.zeros(arguments.slot_mib * MIB, dtype=torch.uint8).to(arguments.target)
    devices = (arguments.source, arguments.target)
    before = {device: used_mib(device) for device in devices}
    print("peers killed | carried by | GB/s | MiB in use: " + ", ".join(devices), flush=True)
    print(f"0 | | | {', '.join(f'{before[device]:.0f}' for device in devices)}")
    for number in range(1, arguments.times + 1):
        name, rate = await receive_from_one(arguments, port, endpoints, slot, number)
        await asyncio.sleep(0.5)  # the driver frees what a dead process had a little later
        used = ", ".join(f"{used_mib(device):.0f}" for device in devices)
        print(f"{number} | {name} | {rate / 1e9:.1f} | {used}", flush=True)
    kept = used_mib(arguments.source) - before[arguments.source]
    print(
        f"kept by the dead on {arguments.source}: {kept:.0f} MiB, {kept / arguments.times:.0f} each"
    )
    await transport.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--source", default="cuda:0", help="where the peers' memory is")
    parser.add_argument("--target", default="cuda:1", help="where this process receives")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--slot-mib", type=int, default=64)
    parser.add_argument("--messages", type=int, default=40)
    uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
