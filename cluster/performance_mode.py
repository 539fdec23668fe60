"""What `--performance-mode` sets: one table for each role.

A row names an option, its value in each mode, and why. A value that a flag, a variable or the file
names beats the table; `--show-config` says which of them it was. README.md shows the same rows:
`python -m cluster.performance_mode` prints them, and a test compares.

balanced: no stream stalls for long and the hardware is used well. interactivity: each stream as
fast as it can be, fewer of them. throughput: the most tokens per second, whoever waits.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from cluster.config import ChoosePresets, Presets, PresetValue
from cluster.options import flag_of

if TYPE_CHECKING:
    from collections.abc import Mapping

PerformanceMode = Literal["balanced", "interactivity", "throughput"]
Device = Literal["GPU", "CPU"]

HELP = (
    "What to set options for: balanced, interactivity (fast streams) or throughput (most tokens "
    "per second). An option that is given beats it; README.md has the tables."
)
MODES: tuple[PerformanceMode, ...] = get_args(PerformanceMode)


@dataclass(frozen=True, slots=True)
class Row:
    """One option of a role. `device`: the row is for nodes on it alone."""

    option: str
    balanced: int
    interactivity: int
    throughput: int
    why: str
    device: Device | None = None

    @property
    def name(self) -> str:
        return flag_of(self.option) + (f" on a {self.device}" if self.device else "")

    def value(self, mode: PerformanceMode) -> int:
        return {
            "balanced": self.balanced,
            "interactivity": self.interactivity,
            "throughput": self.throughput,
        }[mode]


PREFILL = (
    Row(
        "max_num_batched_tokens",
        8192,
        2048,
        16384,
        "A new prompt waits for the step that runs: 2048 tokens of an 8B model are 50 ms on an "
        "H200, 8192 are 220 ms. A prompt's KV leaves chunk by chunk, so shorter chunks also hide "
        "more of the hand-off. Longer ones pay the cost of a step less often.",
        "GPU",
    ),
    Row(
        "max_num_batched_tokens",
        512,
        256,
        1024,
        "The same on a CPU, where a token takes longer and more of them gain little.",
        "CPU",
    ),
    Row(
        "max_num_seqs",
        256,
        32,
        512,
        "Prompts that share a step get their first tokens together, at its end: few of them, "
        "and none waits for the many.",
    ),
    Row(
        "max_cudagraph_capture_size",
        64,
        32,
        64,
        "Of a prompt whose beginning is cached, as in a chat, few tokens are left: a graph of so "
        "many rows computes them sooner than the host launches their kernels. More graphs would "
        "cost start-up time and memory that KV can use.",
    ),
    Row(
        "num_staging_slots",
        8,
        8,
        16,
        "Frames on their way at once; more keep many transfers busy, each slot takes memory.",
    ),
)
DECODE = (
    Row(
        "max_num_seqs",
        256,
        64,
        512,
        "Rows of a step. To 64 a step takes little longer than reading the weights; the more "
        "rows share that, the more tokens per second and the slower each stream.",
    ),
    Row(
        "max_num_batched_tokens",
        2048,
        512,
        8192,
        "Prompts computed here (short tails, recovery) stall every stream for a step: 2048 "
        "tokens of an 8B model for 50 ms on an H200, 512 for about a quarter of that.",
        "GPU",
    ),
    Row(
        "max_num_batched_tokens",
        512,
        128,
        1024,
        "The same on a CPU.",
        "CPU",
    ),
    Row(
        "num_staging_slots",
        8,
        8,
        16,
        "As on a prefill node: arrivals in flight at once.",
    ),
    Row(
        "kv_receive_rate",
        32,
        16,
        0,
        "KV that arrives takes memory and multiprocessors from those who decode: 32 GB/s two "
        "hundredths of their rate on an H200, 254 GB/s more than a fifth. One prefill GPU computes "
        "6 GB/s of an 8B model's; of many at once, some wait.",
        "GPU",
    ),
)
GATEWAY = (
    Row(
        "stream_interval",
        1,
        1,
        8,
        "Tokens in one streamed chunk. One is smoothest; eight cost an eighth of the writes, and "
        "the gateway's processor is then no limit. The first token is never held back.",
    ),
    Row(
        "max_num_queued_reqs",
        1024,
        256,
        4096,
        "Refusing early keeps the first token of those that are taken in near; a long queue "
        "keeps the pools full.",
    ),
    Row(
        "max_num_reqs",
        4096,
        1024,
        16384,
        "The same for all sequences in flight.",
    ),
)
TABLES: Mapping[str, tuple[Row, ...]] = {"prefill": PREFILL, "decode": DECODE, "gateway": GATEWAY}


def presets_of(role: str) -> ChoosePresets:
    """The table of a role, as `load_config` takes it."""

    def choose(given: Mapping[str, object]) -> Presets:
        device = device_kind(str(given.get("device", "cpu")))
        return {"performance_mode": {mode: _presets(role, mode, device) for mode in MODES}}

    return choose


NODE_OPTIONS = frozenset(row.option for role in ("prefill", "decode") for row in TABLES[role])


def node_choices(mode: PerformanceMode, device: Device) -> dict[str, tuple[str, str]]:
    """What the nodes of each role set by their own tables: option -> values and origin in words.

    For a program that starts nodes of both roles and reads one configuration.
    """
    values: dict[str, list[str]] = {}
    for role in ("prefill", "decode"):
        for name, preset in _presets(role, mode, device).items():
            values.setdefault(name, []).append(f"{role} {preset.value}")
    origin = f"performance-mode {mode}, row {{}} of each role's table"
    return {name: (", ".join(each), origin.format(flag_of(name))) for name, each in values.items()}


def _presets(role: str, mode: PerformanceMode, device: Device) -> dict[str, PresetValue]:
    rows = [row for row in TABLES[role] if row.device in (None, device)]
    return {row.option: PresetValue(row.value(mode), f"{role} {row.name}") for row in rows}


def device_kind(device: str, environment: Mapping[str, str] = os.environ) -> Device:
    """What a node with `--device` this would run on; without loading torch."""
    if device != "auto":
        return "GPU" if device.startswith("cuda") else "CPU"
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip(" ,"):
        return "CPU"
    has_driver = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    return "GPU" if has_driver else "CPU"


def render_tables() -> str:
    """The tables as Markdown, as they stand in README.md."""
    parts = []
    for role, rows in TABLES.items():
        head = [f"| {role} | {' | '.join(MODES)} | why |", "|---|---:|---:|---:|---|"]
        parts.append("\n".join([*head, *map(_line, rows)]))
    return "\n\n".join(parts)


def _line(row: Row) -> str:
    values = " | ".join(str(row.value(mode)) for mode in MODES)
    return f"| {row.name} | {values} | {row.why} |"


if __name__ == "__main__":
    print(render_tables())
