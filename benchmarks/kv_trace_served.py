"""`python -m benchmarks.kv_trace_served`: steps from one engine to the other, of served requests.

1. Start `baton serve --prefill 1 --decode 1` on dummy weights, with nodes that mark when a frame
   passes which point, when the engine's thread hears of a sequence, and what becomes of its first
   step (`kv_transfer/trace.py`). The first token is sent right before the commit.
2. Send requests, one at a time, so that every mark is of the request under way. All are handed off.
3. When the nodes have ended, read their marks. For each point: how many microseconds after the last
   frame took its slot it was passed, the median of all requests; that slot is taken as soon as the
   sender has seen the event of the last layer. Of several frames only the last one counts.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.command import publish
from benchmarks.kv_trace import POINTS, heading, median_line
from benchmarks.serve_process import ServeProcess
from benchmarks.served import (
    ADMIN_TOKEN,
    WARMUPS,
    send,
    served_parser,
    set_policy,
    write_model_folder,
)
from kv_transfer.trace import VARIABLE, read_marks

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence

    from benchmarks.kv_trace import Points
    from kv_transfer.trace import Mark

SERVED_POINTS = {
    **POINTS,
    "d.engine": "engine told",
    "d.launch": "launches",
    "d.computed": "second token computed",
    "d.token": "sent",
}
FIRST_STEP = ("d.launch", "d.computed", "d.token")  # later steps pass these, too


def requests_of(marks: Iterable[Mark]) -> list[Points]:
    """Of each sequence that was handed off, in microseconds after its last frame took a slot."""
    latest: Points = {}
    found = []
    for mark in sorted(marks, key=lambda mark: mark.seconds):
        if mark.point in FIRST_STEP and ("d.engine" not in latest or mark.point in latest):
            continue
        latest[mark.point] = mark.seconds * 1e6
        if mark.point == FIRST_STEP[-1]:
            if "s.slot" in latest:  # else all of it was there already
                began = latest["s.slot"]
                found.append({point: at - began for point, at in latest.items()})
            latest = {}
    return found


def marks_between(folder: Path, began: float, ended: float) -> list[Mark]:
    return [
        mark
        for path in folder.glob("*.marks")
        for mark in read_marks(path)
        if began <= mark.seconds < ended
    ]


def serve_requests(arguments: argparse.Namespace, folder: Path) -> list[tuple[int, float, float]]:
    """Prompt length, beginning and end of each row; the nodes have ended and left their marks."""
    write_model_folder(folder, arguments.shape, arguments.num_layers)
    options = ("--load-format", "dummy", "--max-model-len", str(arguments.max_model_len))
    options += ("--admin-token", ADMIN_TOKEN, *arguments.serve)
    rows = []
    with ServeProcess(str(folder), *options, environment={VARIABLE: str(folder)}) as serve:
        print(f"ready in {serve.wait_until_ready():.1f} s", flush=True)
        set_policy(serve.admin_url, local_prefill_tokens=0)
        for input_len in arguments.input_len:
            began = time.perf_counter()
            send(arguments, serve.url, input_len, 1, arguments.seed + input_len)
            rows.append((input_len, began, time.perf_counter()))
    return rows


def measure(arguments: argparse.Namespace, folder: Path) -> str:
    lines = heading(SERVED_POINTS)
    for input_len, began, ended in serve_requests(arguments, folder):
        requests: Sequence[Points] = requests_of(marks_between(folder, began, ended))[WARMUPS:]
        label = f"{input_len} tokens, {len(requests)} requests"
        lines.append(median_line(label, requests, SERVED_POINTS))
    return "\n".join([*lines, "", f"- {arguments.shape}, dummy weights"])


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        table = measure(arguments, Path(folder))
    print(table)
    if arguments.write:
        title = "Steps of a served request, from engine to engine"
        publish("kv_trace_served", "served steps", title, table)


def parse_arguments() -> argparse.Namespace:
    parser = served_parser("kv_trace_served", __doc__)
    parser.add_argument("--output-len", type=int, default=8)
    parser.add_argument("--num-prompts", type=int, default=20)
    return parser.parse_args()


if __name__ == "__main__":
    main()
