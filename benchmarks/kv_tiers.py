"""`python -m benchmarks.kv_tiers`: KV between the pool of a GPU and host memory.

1. rate         blocks scattered over a pool, to slots of pinned memory and back, digests included:
                GB/s beside one plain copy of as many bytes between pinned memory and the GPU.
2. hit          an engine with dummy weights: time to the first token of a prompt that is computed,
                of the same one when it comes back from host memory, and when the GPU has it.
3. disturbance  a decode step of 32 rows, alone and while blocks are copied all the time.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.command import parser_of, publish
from benchmarks.kv_tier_copies import copy_of, rates, require, seconds_of
from benchmarks.model_shapes import SHAPES, write_config
from cluster.prefix_hash import root_hash
from cluster.request import SamplingParams, SequenceRequest
from cluster.startup import StartupReport
from engine.block_copies import CopyKind
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loop import EngineLoop
from engine.schedule import ScheduledChunk, ScheduleDecision
from engine.sequence import Sequence
from prefill_node.scheduler import PrefillScheduler

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    from cluster.request import TokenDelta
    from engine.host_blocks import HostBlocks
    from engine.host_copier import HostCopier

GREEDY = SamplingParams(max_tokens=100_000, seed=0, temperature=0.0, ignore_eos=True)
NUM_ROWS, CONTEXT, NUM_STEPS = 32, 1024, 100


def host_of(engine: Engine) -> HostBlocks:
    host = engine.block_manager.host
    if host is None:
        raise SystemExit("kv_tiers: the engine has no host memory")
    return host


def copier_of(engine: Engine) -> HostCopier:
    if engine.copier is None:
        raise SystemExit("kv_tiers: the engine has no host memory")
    return engine.copier


# ---- an engine ------------------------------------------------------------------------------


class Server:
    """An engine behind its loop, with the scheduler of a prefill node."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._scheduler = PrefillScheduler(
            engine.block_manager, engine.max_num_batched_tokens, engine.max_num_seqs
        )
        self._loop = EngineLoop(
            engine,
            self._scheduler,
            self,
            on_fatal=lambda error: None,
            start_copies=engine.start_copies,
        )
        self._told = threading.Event()
        self._num_cached = 0
        self._loop.start()

    def before_step(self, decision: object) -> None: ...
    def after_step(self, decision: object, output: object) -> None: ...

    def idle(self) -> None:
        pass

    def settled(self, deltas: SequenceOf[TokenDelta]) -> None:
        for delta in deltas:
            self._num_cached = delta.num_cached_tokens or 0
            self._told.set()

    def first_token(self, prompt: list[int], name: str) -> tuple[float, int]:
        """Milliseconds to the first token, and how many tokens were not computed."""
        sequence = sequence_of(self.engine, prompt, name)
        self._told.clear()
        began = time.perf_counter()
        self._loop.call(lambda: self._scheduler.add(sequence))
        self._told.wait()
        return 1000 * (time.perf_counter() - began), self._num_cached

    def settle(self) -> None:
        """Until no copy is under way."""
        host = host_of(self.engine)
        while not self._loop.call(lambda: host.is_settled).result():
            time.sleep(0.01)

    def close(self) -> None:
        self._loop.stop()


def sequence_of(engine: Engine, prompt: list[int], name: str) -> Sequence:
    request = SequenceRequest(
        sequence_id=name, request_id=name, prompt_token_ids=tuple(prompt), sampling=GREEDY
    )
    return Sequence(request, block_size=engine.config.block_size, root=root_hash("benchmark", b""))


def random_prompt(engine: Engine, length: int) -> list[int]:
    prompt: list[int] = torch.randint(0, engine.model_config.vocab_size, (length,)).tolist()
    return prompt


def hits(engine: Engine, lengths: SequenceOf[int], repeats: int) -> list[str]:
    rows = [
        "| prompt | computed (ms) | from host memory (ms) | from the GPU (ms) | computed / host |",
        "|---:|---:|---:|---:|---:|",
    ]
    server = Server(engine)
    longest = max(lengths)
    with closing(server):
        for _ in range(2):
            server.first_token(random_prompt(engine, longest), "warm up")
            server.settle()
        for length in lengths:
            times: dict[str, list[float]] = {"computed": [], "host": [], "device": []}
            for turn in range(repeats):
                prompt = random_prompt(engine, length)
                times["computed"].append(server.first_token(prompt, f"c{turn}")[0])
                server.settle()
                num_evicted = 0
                while num_evicted < engine.block_manager.num_blocks * engine.config.block_size:
                    server.first_token(random_prompt(engine, longest), f"f{num_evicted}")
                    server.settle()
                    num_evicted += longest
                for tier in ("host", "device"):
                    milliseconds, num_cached = server.first_token(prompt, f"{tier}{turn}")
                    require(num_cached >= length - 32, f"only {num_cached} tokens from {tier}")
                    times[tier].append(milliseconds)
                    server.settle()
            computed, host, device = (statistics.median(each) for each in times.values())
            rows.append(
                f"| {length} | {computed:.1f} | {host:.1f} | {device:.1f} | {computed / host:.1f} |"
            )
    return [*rows, "", f"- counters: {host_of(engine).stats}"]


def disturbance(engine: Engine) -> list[str]:
    """Decode steps with blocks moving beside them, of sequences that nobody reads."""
    copier, manager = copier_of(engine), engine.block_manager
    manager.reset_prefix_cache()
    context = min(CONTEXT, engine.max_model_len - 2 * NUM_STEPS * 4)
    decoding = []
    for row in range(NUM_ROWS):
        sequence = sequence_of(engine, random_prompt(engine, context), f"d{row}")
        require(manager.allocate(sequence, context + 5 * NUM_STEPS), "no room for the rows")
        while sequence.num_output_tokens == 0:
            chunk = min(sequence.num_uncomputed_tokens, engine.max_num_batched_tokens)
            engine.step(ScheduleDecision((ScheduledChunk(sequence, chunk),)))
        decoding.append(sequence)
    moved = sequence_of(engine, random_prompt(engine, manager.num_free_blocks * 8), "moved")
    require(manager.allocate(moved, moved.num_tokens), "no room for what is moved")
    num_moved = min(len(moved.block_table), copier.slots.shape[0], 256)
    ids, slots = moved.block_table[:num_moved], list(range(num_moved))
    rows = ["| copies | decode step p50 (ms) | p99 (ms) | p50 / alone |", "|---|---:|---:|---:|"]
    alone = 0.0
    kinds: dict[str, list[CopyKind]] = {
        "none": [],
        "saves": [CopyKind.SAVE],
        "loads": [CopyKind.LOAD],
        "both": list(CopyKind),
    }
    for name, copied in kinds.items():
        halves = [copy_of(kind, ids[i::2], slots[i::2]) for i, kind in enumerate(copied)]
        times = steps_beside(engine, decoding, lambda halves=halves: seconds_of(copier, halves))  # type: ignore[misc]
        p50 = statistics.median(times)
        alone = alone or p50
        p99 = statistics.quantiles(times, n=100)[98]
        rows.append(f"| {name} | {p50:.2f} | {p99:.2f} | {p50 / alone:.3f} |")
    for sequence in (*decoding, moved):
        manager.free(sequence)
    return rows


def steps_beside(
    engine: Engine, decoding: SequenceOf[Sequence], work: Callable[[], float]
) -> list[float]:
    """Milliseconds of decode steps while another thread repeats `work`."""
    stopping = threading.Event()

    def repeat() -> None:
        while not stopping.is_set():
            if work() < 1e-4:
                return

    thread = threading.Thread(target=repeat)
    thread.start()
    decision = ScheduleDecision(tuple(ScheduledChunk(each, 1) for each in decoding), decodes=True)
    times = []
    for _ in range(NUM_STEPS):
        began = time.perf_counter()
        engine.step(decision)
        times.append(1000 * (time.perf_counter() - began))
    stopping.set()
    thread.join()
    return times[5:]


def engine_tables(arguments: argparse.Namespace) -> list[str]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_config(folder, arguments.shape)
        longest = max(arguments.prompts)
        # Two of the longest prompts; or all rows of the decode steps, and something to move.
        num_tokens = max(2 * (longest + 1024), NUM_ROWS * (CONTEXT + 5 * NUM_STEPS) + 512 * 16)
        config = EngineConfig(
            model=folder,
            load_format="dummy",
            device=arguments.device,
            max_model_len=longest + 1024,
            max_num_seqs=NUM_ROWS,
            num_gpu_blocks_override=num_tokens // 16 + 64,
            kv_offloading_size=arguments.host_gib,
        )
        engine = Engine.create(config, progress=StartupReport(sink=lambda fact: None))
    with closing(engine):
        text = hits(engine, arguments.prompts, arguments.hit_repeats)
        print("\n".join(text), flush=True)
        steps = disturbance(engine)
        print("\n".join(steps), flush=True)
    return [*text, "", *steps]


def main() -> int:
    parser = parser_of("kv_tiers", __doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b", help="of the engine")
    parser.add_argument("--num-layers", type=int, default=32)
    parser.add_argument("--unit-kib", type=int, default=64, help="one layer of one block")
    parser.add_argument("--mib", type=int, default=1024, help="moved at once")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--hit-repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--host-gib", type=float, default=24.0)
    arguments = parser.parse_args()
    text = rates(arguments)
    print("\n".join(text), flush=True)
    text += ["", *engine_tables(arguments)]
    if arguments.write:
        publish("kv_tiers", "kv_tiers", "KV in host memory", "\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
