"""`python -m benchmarks.kv_trace`: where the time of a hand-off goes, step by step.

1. Start the pair of `benchmarks.kv_transfer`; both of its processes mark when a frame passes which
   point (`kv_transfer/trace.py`).
2. In turns, each hand-off that somebody waits for: the last layer of a prompt, whose processes are
   awake; a tail of one block and a lone one, whose processes have slept.
3. For each point: how many microseconds after the beginning it was passed, the median of all turns.
   Of a hand-off in several frames there is a line for the first and one for the last.

    python -m benchmarks.kv_trace --source cuda:0 --target cuda:1 [--frames] [--write]
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.command import parser_of, publish
from benchmarks.kv_handoffs import hand_off, last_layer
from benchmarks.kv_pair import BLOCK_SIZE, Pair, decode_process, run_as_node
from benchmarks.kv_transfer import LAYER_SECONDS, add_options, make_options, with_defaults
from kv_transfer.trace import TRACE

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from benchmarks.kv_handoffs import Taken

    Points = dict[str, float]

# s: sender, r: receiver.
FRAME_POINTS = {
    "s.slot": "slot taken",
    "s.gather_queued": "packing queued",
    "s.gathered": "packed",
    "s.posted": "posted",
    "r.header": "header heard",
    "r.posted": "receive posted",
    "r.landed": "landed",
    "r.scatter_queued": "read queued",
    "r.verified": "verified",
}
POINTS = {
    **FRAME_POINTS,
    "s.commit": "commit sent",
    "r.commit": "commit heard",
    "r.start": "node told",
}


def frames_of(taken: Taken) -> list[Points]:
    """When each frame passed which point, in microseconds after the beginning, in the order in
    which they were done with. What is marked once for all of them is told of the last."""
    frames: dict[tuple[int, int], Points] = {}
    of_all: Points = {}
    for mark in taken.marks:
        is_frame = mark.point in FRAME_POINTS
        points = frames.setdefault((mark.layer, mark.position), {}) if is_frame else of_all
        points[mark.point] = (mark.seconds - taken.began) * 1e6
    ordered = sorted(frames.values(), key=lambda points: max(points.values()))
    if ordered:
        ordered[-1].update(of_all)
    return ordered


def heading(points: Mapping[str, str] = POINTS) -> list[str]:
    return [f"| us | {' | '.join(points.values())} |", "|---|" + "---:|" * len(points)]


def median_line(label: str, runs: Sequence[Points], points: Mapping[str, str] = POINTS) -> str:
    """A point that most runs did not pass has no median."""
    cells = []
    for point in points:
        values = [run[point] for run in runs if point in run]
        cells.append(f"{statistics.median(values):.0f}" if 2 * len(values) > len(runs) else "")
    return f"| {label} | {' | '.join(cells)} |"


def lines_of(label: str, runs: Sequence[Taken]) -> list[str]:
    frames = [frames_of(taken) for taken in runs]
    last = [each[-1] for each in frames]
    if all(len(each) == 1 for each in frames):
        return [median_line(label, last)]
    first = [each[0] for each in frames]
    return [median_line(f"{label}, first frame", first), median_line(f"{label}, last frame", last)]


def hand_offs(pair: Pair, longest: int) -> dict[str, Callable[[], Awaitable[Taken]]]:
    short = longest // 4
    tokens = f"{short * BLOCK_SIZE} tokens"
    found = {
        f"last layer of {tokens}, {seconds * 1e3:.0f} ms apart": partial(
            last_layer, pair, short, seconds
        )
        for seconds in LAYER_SECONDS
    }
    return {
        **found,
        f"tail of {BLOCK_SIZE} tokens": partial(hand_off, pair, longest, 1),
        f"lone, {tokens}": partial(hand_off, pair, short, short),
    }


async def run(arguments: argparse.Namespace) -> str:
    options = make_options(arguments)
    async with Pair(options, decode_process, True) as pair:
        TRACE.start()
        turns: dict[str, list[Taken]] = {}
        for turn in range(arguments.warmup + arguments.repeats):
            for label, once in hand_offs(pair, arguments.prompt_blocks).items():
                taken = await once()
                if turn >= arguments.warmup:
                    turns.setdefault(label, []).append(taken)
        transports = ", ".join(pair.agent.transports_in_use)
    lines = heading()
    for label, runs in turns.items():
        lines += lines_of(label, runs)
        if arguments.frames:
            for num, points in enumerate(frames_of(runs[-1]), 1):
                print(median_line(f"{label}, frame {num}", [points]))
    num = arguments.repeats
    lines += ["", f"- {options.source} -> {options.target} over {transports}; medians of {num}"]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = parser_of("kv_trace", __doc__)
    add_options(parser)
    parser.add_argument("--frames", action="store_true", help="show each frame of the last turn")
    return with_defaults(parser.parse_args())


def main() -> None:
    arguments = parse()
    table = run_as_node(run(arguments))
    print(table)
    if arguments.write:
        device = "CPU" if arguments.source == "cpu" else "two GPUs"
        title = f"Steps of a hand-off, {device}"
        publish("kv_trace", f"KV transfer steps, {device}", title, table)


if __name__ == "__main__":
    main()
