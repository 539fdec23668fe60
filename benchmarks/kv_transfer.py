"""`python -m benchmarks.kv_transfer`: KV from pool to pool between two processes, over UCX.

Everything a hand-off does is in the numbers: the control stream, packing scattered blocks, digests
on both sides, the wire, scattering, and the call that starts the sequence. No engine runs.

1. raw      a plain copy from device to device, of the same run: what there is to reach.
2. empty    the decode node holds every block: the commit alone.
3. last     the layers of a prompt come one by one and are sent as they come: from the last one's
   layer    event until the sequence starts. It is what a request waits for, of processes that are
            awake as a busy cluster's are; layers 1 to 2 ms apart are those of 2048 tokens.
4. tail     all but the last tokens was sent before, and both processes have slept since: the same
            of a request that comes after a pause.
5. lone     every block of one prompt is computed already: from the first frame asked for until the
            sequence starts, with nothing else under way to hide its beginning and end. It finds
            them asleep, too.
6. stream   several prompts at once, from the first frame until the last sequence starts.
7. digests  the longest stream between a pair that takes digests and one that does not, in turns.
            Both run the same kernels, but for what digests are.

Where the time of 3 to 5 goes: `benchmarks.kv_trace`.

    python -m benchmarks.kv_transfer --source cuda:0 --target cuda:1 [--write]
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks.command import parser_of, publish
from benchmarks.kv_handoffs import hand_off, last_layer, stream
from benchmarks.kv_pair import (
    ALL_HELD,
    BLOCK_SIZE,
    MIB,
    Pair,
    PairOptions,
    run_as_node,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.kv_handoffs import Taken

# Prompts at once, in quarters of the longest prompt. The last is long enough to show the rate
# that a stream goes on with.
STREAMS = ((4, 1), (8, 1), (2, 4), (8, 8))
RAW_MIB = (32, 256, 1024)
LAYER_SECONDS = (0.001, 0.002)  # between two layers of a prompt


@dataclass(frozen=True, slots=True)
class Row:
    label: str
    num_bytes: int
    seconds: list[float]  # sorted

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.num_bytes / self.median

    def cells(self, raw_rate: float) -> str:
        p99 = self.seconds[min(len(self.seconds) - 1, int(0.99 * len(self.seconds)))]
        times = f"{self.median * 1e3:.3f} | {p99 * 1e3:.3f} | {self.seconds[0] * 1e3:.3f}"
        if not self.num_bytes:
            return f"| {self.label} | 0 | {times} | | |"
        rate = f"{self.rate / 1e9:.1f} | {self.rate / raw_rate:.2f}x"
        return f"| {self.label} | {self.num_bytes / MIB:.0f} | {times} | {rate} |"


def raw_copy(options: PairOptions, num_bytes: int, repeats: int) -> Row:
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=options.source)
    target = torch.empty_like(source, device=options.target)
    seconds = []
    for _ in range(repeats + 3):
        _synchronize()
        began = time.perf_counter()
        for _ in range(10):
            target.copy_(source, non_blocking=True)
        _synchronize()
        seconds.append((time.perf_counter() - began) / 10)
    return Row("raw copy", num_bytes, sorted(seconds[3:]))


def _synchronize() -> None:
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


async def repeated(
    arguments: argparse.Namespace, once: Callable[[], Awaitable[Taken]]
) -> list[float]:
    seconds = [(await once()).seconds for _ in range(arguments.warmup + arguments.repeats)]
    return sorted(seconds[arguments.warmup :])


async def hand_off_rows(arguments: argparse.Namespace, pair: Pair) -> list[Row]:
    block_bytes, longest = pair.options.block_bytes, arguments.prompt_blocks
    seconds = await repeated(arguments, partial(hand_off, pair, longest, longest, ALL_HELD))
    rows = [Row("empty", 0, seconds)]
    for apart in LAYER_SECONDS:
        num_blocks = longest // 4
        seconds = await repeated(arguments, partial(last_layer, pair, num_blocks, apart))
        label = f"last layer of {num_blocks * BLOCK_SIZE} tokens, {apart * 1e3:.0f} ms apart"
        rows.append(Row(label, num_blocks * pair.options.unit_bytes, seconds))
    for num_last in (1, 8, 32, 128):
        if num_last < longest:
            seconds = await repeated(arguments, partial(hand_off, pair, longest, num_last))
            rows.append(
                Row(f"tail of {num_last * BLOCK_SIZE} tokens", num_last * block_bytes, seconds)
            )
    for num_blocks in (longest // 4, longest, 2 * longest):
        if num_blocks > pair.options.num_blocks:
            continue
        seconds = await repeated(arguments, partial(hand_off, pair, num_blocks, num_blocks))
        label = f"lone, {num_blocks * BLOCK_SIZE} tokens"
        rows.append(Row(label, num_blocks * block_bytes, seconds))
    for num_prompts, quarters in STREAMS:
        num_blocks = quarters * longest // 4
        if num_prompts * num_blocks > pair.options.num_blocks:
            continue
        seconds = await repeated(arguments, partial(stream, pair, num_prompts, num_blocks))
        label = f"stream, {num_prompts} x {num_blocks * BLOCK_SIZE} tokens"
        rows.append(Row(label, num_prompts * num_blocks * block_bytes, seconds))
    return rows


async def digest_rows(arguments: argparse.Namespace, *pairs: Pair) -> tuple[list[Row], str]:
    """Of the longest stream, through a pair with digests and one without: in turns, and each first
    as often as the other, so that whatever else changes on the machine changes for both."""
    num_prompts, quarters = STREAMS[-1]
    num_blocks = quarters * arguments.prompt_blocks // 4
    turns = []
    for turn in range(arguments.warmup + arguments.repeats):
        seconds = [0.0, 0.0]
        for which in (0, 1) if turn % 2 else (1, 0):
            seconds[which] = (await stream(pairs[which], num_prompts, num_blocks)).seconds
        turns.append(seconds)
    on, off = zip(*turns[arguments.warmup :], strict=True)
    num_bytes = num_prompts * num_blocks * pairs[0].options.block_bytes
    rows = [
        Row(f"the last stream, digests {name}", num_bytes, sorted(took))
        for name, took in (("on", on), ("off", off))
    ]
    costs = sorted(100 * (1.0 - without / with_) for with_, without in zip(on, off, strict=True))
    low, high = costs[len(costs) // 4], costs[-1 - len(costs) // 4]
    note = (
        f"digests cost {statistics.median(costs):.2f} % of a stream's rate: the median of "
        f"{len(costs)} turns, half of which lie between {low:.2f} and {high:.2f} %"
    )
    return rows, note


async def run(arguments: argparse.Namespace) -> str:
    options = make_options(arguments)
    raw = [raw_copy(options, mib * MIB, 5) for mib in RAW_MIB[: arguments.num_raw]]
    raw_rate = max(row.rate for row in raw)
    async with AsyncExitStack() as stack:
        pair = await stack.enter_async_context(Pair(options))
        rows = await hand_off_rows(arguments, pair)
        transports = ", ".join(pair.agent.transports_in_use)
        staging = pair.agent.staging
        notes = [
            f"{options.source} -> {options.target} over {transports}; {staging.num_slots} slots of "
            f"{staging.slot_bytes / MIB:.0f} MiB on each side",
        ]
        # In host memory `benchmarks.host_transfer` tells what digests cost.
        if options.source != "cpu":
            bare = Pair(replace(options, takes_digests=False))
            bare = await stack.enter_async_context(bare)
            on_off, note = await digest_rows(arguments, pair, bare)
            rows += on_off
            notes.append(note)
    lines = [
        "| | MiB | p50 (ms) | p99 (ms) | best (ms) | GB/s | of the raw copy |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(row.cells(raw_rate) for row in [*raw, *rows]),
        "",
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines)


def make_options(arguments: argparse.Namespace) -> PairOptions:
    slot_mib = arguments.slot_mib
    return PairOptions(
        source=arguments.source,
        target=arguments.target,
        num_layers=arguments.num_layers,
        unit_bytes=arguments.unit_kib * 1024,
        num_blocks=arguments.num_blocks,
        slot_bytes=None if slot_mib is None else int(slot_mib * MIB),
        num_slots=arguments.num_slots,
        ucx_tls=arguments.tls,
        require_transport=arguments.require_transport,
    )


def parse() -> argparse.Namespace:
    parser = parser_of("kv_transfer", __doc__)
    add_options(parser)
    return with_defaults(parser.parse_args())


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", default="cpu", help="device of the prefill node's pool")
    parser.add_argument("--target", default="cpu", help="device of the decode node's pool")
    parser.add_argument("--num-layers", type=int, default=None)
    parser.add_argument("--unit-kib", type=int, default=None, help="one layer of one block")
    parser.add_argument("--num-blocks", type=int, default=None, help="of each pool")
    parser.add_argument("--prompt-blocks", type=int, default=None)
    parser.add_argument("--num-raw", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--slot-mib", type=float, default=None)
    parser.add_argument("--num-slots", type=int, default=None)
    parser.add_argument("--tls", default=None, help="UCX_TLS")
    parser.add_argument("--require-transport", default="any")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)


def with_defaults(found: argparse.Namespace) -> argparse.Namespace:
    """On a GPU the KV of an 8B model and a prompt of 8192 tokens; on a CPU a small one."""
    is_cpu = found.source == "cpu"
    defaults = (12, 16, 256, 64, 1) if is_cpu else (32, 64, 8192, 512, len(RAW_MIB))
    names = ("num_layers", "unit_kib", "num_blocks", "prompt_blocks", "num_raw")
    for name, value in zip(names, defaults, strict=True):
        if getattr(found, name) is None:
            setattr(found, name, value)
    return found


def main() -> None:
    arguments = parse()
    table = run_as_node(run(arguments))
    print(table)
    if arguments.write:
        device = "CPU" if arguments.source == "cpu" else "two GPUs"
        title = f"KV transfer between {device}"
        publish("kv_transfer", f"KV transfer, {device}", title, table)


if __name__ == "__main__":
    main()
