"""`python -m benchmarks.host_transfer`: KV between two host-memory pools, beside plain sockets.

The KV of 2048 tokens of an 8B model. In every round each row moves the same bytes once, so that
rows meet the same weather:

    plain socket   one buffer to another, the fastest of several settings (`baton/raw_copy.py`)
    ... unpaced    the same, by Reno instead of the machine's congestion control
    pool to pool   what a hand-off does: digest, frames, verify, place, start
    ... none       without digests: what they cost
    ... multiply-shift, the digest that every device can take, by staging slots

Rates are medians; "of the socket" is the median of the rounds' ratios, first to the plain socket,
then to the unpaced one. Processor time is that of both processes, by byte: on a machine with few
cores it is what limits a copy on loopback.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import uvloop

from baton.raw_copy import SETTINGS, UNPACED_SETTINGS, RawSockets
from benchmarks.command import parser_of, publish
from benchmarks.kv_pair import MIB, Pair, PairOptions, decode_process
from kv_transfer import host_moves

if TYPE_CHECKING:
    import argparse
    from multiprocessing.connection import Connection

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
CONTROL = "/proc/sys/net/ipv4/tcp_congestion_control"
DIGESTS = ("xxh3", "none", "multiply_shift")


@dataclass
class Row:
    label: str
    num_bytes: int
    seconds: list[float] = field(default_factory=list)
    processor_seconds: float = 0.0

    def describe(self, references: list[Row]) -> str:
        rate = self.num_bytes / statistics.median(self.seconds) / 1e9
        best = self.num_bytes / min(self.seconds) / 1e9
        ratios = " | ".join(f"{self.ratio_to(each):.2f}x" for each in references)
        spent = self.processor_seconds / len(self.seconds) / self.num_bytes * 1e9
        return f"| {self.label} | {rate:.2f} | {best:.2f} | {ratios} | {spent:.2f} |"

    def ratio_to(self, other: Row) -> float:
        """Of their rates."""
        return statistics.median(
            theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True)
        )


def processor_seconds(*pids: int) -> float:
    """User and system time of processes so far."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS_PER_SECOND


class PoolToPool:
    """Two processes with a pool each; `copy` hands one prompt off."""

    def __init__(self, options: PairOptions, digest: str, num_blocks: int) -> None:
        self._pair = Pair(options, decode_with_digest, digest)
        self._digest = digest
        self._num_blocks = num_blocks
        choose_digest(digest)

    async def start(self) -> None:
        await self._pair.__aenter__()

    @property
    def transports(self) -> tuple[str, ...]:
        return self._pair.agent.transports_in_use

    @property
    def pids(self) -> tuple[int, int]:
        return os.getpid(), self._pair.pid

    async def copy(self) -> float:
        choose_digest(self._digest)
        name = self._pair.open(self._num_blocks)
        began = time.perf_counter()
        self._pair.computed(name, self._num_blocks)
        (started,) = await self._pair.started([name])
        return started.at - began

    async def close(self) -> None:
        await self._pair.__aexit__()


def decode_with_digest(
    options: PairOptions, where: Connection, started: Connection, digest: str
) -> None:
    choose_digest(digest)
    decode_process(options, where, started)


def choose_digest(name: str) -> None:
    """Of this process: "xxh3", or "multiply_shift" (by staging slots)."""
    torch.set_num_threads(1)
    host_moves.has_host_digests = lambda: name != "multiply_shift"  # type: ignore[attr-defined]


async def run(arguments: argparse.Namespace) -> tuple[list[Row], list[Row], list[str]]:
    """The rows of ours, the fastest plain sockets, and what was used."""
    block_bytes = arguments.num_layers * arguments.unit_kib * 1024
    num_bytes = arguments.prompt_blocks * block_bytes
    settings = [*SETTINGS, *UNPACED_SETTINGS]
    sockets = [(RawSockets(s, num_bytes), Row(f"plain socket, {s}", num_bytes)) for s in settings]
    ours = []
    for digest in arguments.digests:
        pair = PoolToPool(make_options(arguments, digest), digest, arguments.prompt_blocks)
        await pair.start()
        ours.append((pair, Row(f"pool to pool, digests: {digest.replace('_', '-')}", num_bytes)))
    for turn in range(arguments.warmup + arguments.repeats):
        for raw, row in sockets:
            before = processor_seconds(*raw.pids)
            note(row, await asyncio.to_thread(raw.copy), before, raw.pids, turn, arguments)
        for pair, row in ours:
            before = processor_seconds(*pair.pids)
            note(row, await pair.copy(), before, pair.pids, turn, arguments)
    used = [f"transport: {', '.join(pair.transports)}" for pair, _ in ours[:1]]
    for raw, _ in sockets:
        raw.close()
    for pair, _ in ours:
        await pair.close()
    found = [row for _, row in sockets]
    kinds = (found[: len(SETTINGS)], found[len(SETTINGS) :])
    return [row for _, row in ours], [fastest(kind) for kind in kinds], used


def fastest(rows: list[Row]) -> Row:
    return min(rows, key=lambda row: statistics.median(row.seconds))


def note(
    row: Row,
    seconds: float,
    before: float,
    pids: tuple[int, int],
    turn: int,
    arguments: argparse.Namespace,
) -> None:
    if turn >= arguments.warmup:
        row.seconds.append(seconds)
        row.processor_seconds += processor_seconds(*pids) - before


def make_options(arguments: argparse.Namespace, digest: str) -> PairOptions:
    slot_mib = arguments.slot_mib
    return PairOptions(
        source="cpu",
        target="cpu",
        num_layers=arguments.num_layers,
        unit_bytes=arguments.unit_kib * 1024,
        num_blocks=arguments.num_blocks,
        slot_bytes=None if slot_mib is None else int(slot_mib * MIB),
        num_slots=arguments.num_slots,
        ucx_tls=arguments.tls,
        require_transport="any",
        takes_digests=digest != "none",
    )


def parse() -> argparse.Namespace:
    parser = parser_of("host_transfer", __doc__)
    parser.add_argument("--tls", default=None, help="UCX_TLS")
    parser.add_argument("--num-layers", type=int, default=32)
    parser.add_argument("--unit-kib", type=int, default=64, help="one layer of one block")
    parser.add_argument("--num-blocks", type=int, default=160, help="of each pool")
    parser.add_argument("--prompt-blocks", type=int, default=128)
    parser.add_argument("--slot-mib", type=float, default=None)
    parser.add_argument("--num-slots", type=int, default=8)
    parser.add_argument("--digests", nargs="+", choices=DIGESTS, default=DIGESTS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    load = os.getloadavg()[0]
    rows, references, used = uvloop.run(run(arguments))
    size = rows[0].num_bytes / MIB
    lines = [
        f"| {size:.0f} MiB, blocks in scrambled order | GB/s | best | of the socket "
        "| of an unpaced one | processor ns/B |",
        "|---|---:|---:|---:|---:|---:|",
        *(row.describe(references) for row in (*references, *rows)),
    ]
    used.append(f"congestion control of the machine: {Path(CONTROL).read_text().strip()}")
    used.append(f"load of the machine before and after: {load:.1f}, {os.getloadavg()[0]:.1f}")
    print("\n".join([*lines, *used]))
    if arguments.write:
        name = f"host transfer {arguments.tls or 'default'}"
        title = "KV transfer in host memory"
        if arguments.tls is not None:
            title += f", by UCX ({arguments.tls})"
        publish("host_transfer", name, title, "\n".join(lines), used)


if __name__ == "__main__":
    main()
