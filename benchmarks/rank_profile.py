"""`python -m benchmarks.rank_profile`: where a decode step goes when several GPUs share a model.

    1. For each number of ranks as many processes, each with a shard of random weights; they meet
       as the ranks of an engine do.
    2. The step as a graph, replayed by all ranks together: whole, without the sums over the ranks,
       without attention, and its products alone; then each product alone, through all layers.
    3. One sum over the ranks, small and large: by `kernels.peer_sum` in a graph, and by NCCL.
    4. The whole step once more under torch's profiler. Kernels overlap, so what counts for each
       is the time from the end of those before it to its own end; a layer of them is shown, and
       what lies between the layers of two steps.

`--write` puts the tables into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.command import parser_of, publish
from benchmarks.model_shapes import SHAPES
from benchmarks.random_model import DTYPE, Model, captured, config_of
from engine.models.decoder_layer import DecoderLayer
from engine.tensor_parallel.gpu_ranks import GpuRanks
from engine.tensor_parallel.ranks import c10d
from engine.tensor_parallel.rendezvous import FirstRank, OtherRank
from engine.tensor_parallel.shard import Shard
from engine.tensor_parallel.sharded import SummedMatrix
from engine.tensor_parallel.wire import Channel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.models.linear import Matrix
    from engine.tensor_parallel.rendezvous import Rendezvous

STEPS, REPEATS = 10, 11
ROWS_OF_ENGINE = 256  # of the decode steps that sums are made ready for
SUM_KIB = (8, 64, 256, 512, 1024, 2048, 8192, 65536)
PROFILED_STEPS = 3
LAYER_BEGINS = "_attention_kernel"
NAME_LENGTH = 40
Run = Callable[[], object]


class Spent(NamedTuple):
    """Microseconds of one kernel of a layer: its own, and from the end of those before it."""

    name: str
    own: float
    added: float


class Place:
    """One rank of this benchmark: a process with a GPU."""

    def __init__(
        self, shard: Shard, rendezvous: Rendezvous, folder: str, arguments: argparse.Namespace
    ) -> None:
        torch.cuda.set_device(shard.rank)
        self.shard = shard
        self._rendezvous = rendezvous
        self._arguments = arguments
        self.ranks: GpuRanks | None = None
        whole = config_of(arguments.shape)
        rows = max(arguments.decode)
        if not shard.is_whole:
            self.ranks = GpuRanks(
                shard.fitted(whole), c10d.FileStore(str(Path(folder) / "store"), shard.size),
                rendezvous, torch.device("cuda", shard.rank),
                largest_small=ROWS_OF_ENGINE * whole.hidden_size * DTYPE.itemsize,
                largest_sum=SUM_KIB[-1] << 9, hidden_size=whole.hidden_size,
                logits_shape=(rows, -(-whole.vocab_size // shard.size)), dtype=DTYPE,
            )  # fmt: skip
        num_tokens = rows * (arguments.context + 16)
        self.model = Model(arguments.shape, num_tokens, arguments.context, self.ranks)

    def close(self) -> None:
        if self.ranks is not None:
            self._rendezvous.exchange({})
            self.ranks.close()

    def measure(self) -> Iterator[str]:
        """Lines of markdown, on every rank."""
        for num_seqs in self._arguments.decode:
            figures = {name: self._ms(run) for name, run in self._variants(num_seqs)}
            yield f"{self._name()}, decode of {num_seqs}, context {self._arguments.context}:"
            yield "; ".join(f"{name} {figure:.3f} ms" for name, figure in figures.items())
        for name, run, num_bytes in self._products():
            micros = 1e3 * self._ms(run) / len(self.model.decoder._layers)
            yield f"{name}: {micros:.2f} us, {num_bytes / micros / 1e6:.2f} TB/s"
        if self.ranks is not None:
            yield from self._sums(self.ranks)
        for num_seqs in self._arguments.decode:
            yield from self._parts(self._step(num_seqs), num_seqs)

    def _name(self) -> str:
        return f"rank {self.shard.rank} of {self.shard.size}"

    def _step(self, num_seqs: int) -> Run:
        batch = self.model.decode(num_seqs, self._arguments.context)
        return captured(lambda: self.model.run(batch))

    def _variants(self, num_seqs: int) -> Iterator[tuple[str, Run]]:
        batch = self.model.decode(num_seqs, self._arguments.context)
        yield "whole", self._step(num_seqs)
        with _no_meetings():
            yield "without sums", self._step(num_seqs)
            with mock.patch.object(DecoderLayer, "_attention", lambda self, query, *_: query):
                yield "without sums and attention", self._step(num_seqs)
            yield "products", captured(lambda: self._all_products(batch.token_ids))

    def _all_products(self, token_ids: torch.Tensor) -> torch.Tensor:
        decoder = self.model.decoder
        residual = decoder._embed(token_ids)
        for layer in decoder._layers:
            qkv = layer.qkv.normed(residual, layer.input_norm, 1e-5)
            output, down = _own(layer.output), _own(layer.down)
            attended = qkv[:, : self.model.config.num_heads * self.model.config.head_size]
            residual = output.add_to(attended, residual)
            activated = layer.gate_up.normed_silu_mul(residual, layer.post_norm, 1e-5)
            residual = down.add_to(activated, residual)
        return decoder._lm_head.normed(residual, decoder._norm, 1e-5)

    def _products(self) -> Iterator[tuple[str, Run, int]]:
        """Name, all layers' product one after the other, and bytes of one: of one row."""
        config, layers = self.model.config, self.model.decoder._layers
        hidden = torch.randn(1, config.hidden_size, dtype=DTYPE, device="cuda")
        attended = hidden[:, : config.num_heads * config.head_size]
        activated = torch.randn(1, config.intermediate_size, dtype=DTYPE, device="cuda")
        calls: dict[str, Callable[[DecoderLayer], object]] = {
            "qkv": lambda layer: layer.qkv.normed(hidden, layer.input_norm, 1e-5),
            "output": lambda layer: _own(layer.output).add_to(attended, hidden),
            "gate_up": lambda layer: layer.gate_up.normed_silu_mul(hidden, layer.post_norm, 1e-5),
            "down": lambda layer: _own(layer.down).add_to(activated, hidden),
        }
        for name, call in calls.items():
            views = _own(getattr(layers[0], name)).checkpoint_views().values()
            num_bytes = sum(view.numel() * view.element_size() for view in views)
            yield name, captured(partial(_through, layers, call)), num_bytes

    def _sums(self, ranks: GpuRanks) -> Iterator[str]:
        yield "| KiB of one sum | in a graph (us) | launched (us) | NCCL, launched (us) |"
        yield "|---:|---:|---:|---:|"
        for kib in SUM_KIB:
            x = torch.zeros(kib << 9, dtype=DTYPE, device="cuda")
            ours = 1e3 * self._ms(partial(_again, ranks.sum, x)) / STEPS
            small = ""
            if ranks._inboxes.holds(x):
                small = f"{1e3 * self._ms(captured(partial(_again, ranks.sum, x))) / STEPS:.2f}"
            large = 1e3 * self._ms(partial(_reduced, ranks, x))
            yield f"| {kib} | {small} | {ours:.1f} | {large:.1f} |"

    def _ms(self, run: Run) -> float:
        """Of one run; all ranks begin together."""
        begin, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        samples = []
        run()
        torch.cuda.synchronize()
        for _ in range(REPEATS):
            self._rendezvous.exchange({})
            begin.record()
            for _ in range(STEPS):
                run()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) / STEPS)
        return statistics.median(samples)

    def _parts(self, run: Run, num_seqs: int) -> Iterator[str]:
        run()
        torch.cuda.synchronize()
        self._rendezvous.exchange({})
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(PROFILED_STEPS):
                run()
            torch.cuda.synchronize()
        events = [each for each in recorded.events() or () if each.device_time > 0]
        spans = sorted((each.time_range.start, each.time_range.end, each.name) for each in events)
        for title, part in zip(("a layer", "between two steps"), parts_of(spans), strict=False):
            yield f"| {self._name()}, {num_seqs} rows, {title} | own us | added us |"
            yield "|---|---:|---:|"
            for spent in part:
                yield f"| {spent.name[:NAME_LENGTH]} | {spent.own:.1f} | {spent.added:.1f} |"
            yield f"| all | | {sum(spent.added for spent in part):.1f} |"


def parts_of(spans: Sequence[tuple[float, float, str]]) -> list[list[Spent]]:
    """The mean layer of kernels `(start, end, name)`, given in the order of their starts, and what
    lies between the last layer of a step and the second of the next one.

    A layer is what lies between two kernels of `LAYER_BEGINS`.
    """
    begins = [at for at, span in enumerate(spans) if LAYER_BEGINS in span[2]]
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for begin, end in itertools.pairwise(begins):
        alike[tuple(name for _, _, name in spans[begin:end])].append(begin)
    usual = sorted(alike.items(), key=lambda item: -len(item[1]))[:2]
    return [_mean_part(spans, names, places) for names, places in usual]


def _mean_part(
    spans: Sequence[tuple[float, float, str]], names: Sequence[str], places: Sequence[int]
) -> list[Spent]:
    own, added = ([0.0] * len(names) for _ in range(2))
    for begin in places:
        before = max((span[1] for span in spans[max(0, begin - 8) : begin]), default=0.0)
        for place, (start, stop, _) in enumerate(spans[begin : begin + len(names)]):
            own[place] += (stop - start) / len(places)
            added[place] += max(0.0, stop - before) / len(places)
            before = max(before, stop)
    return [Spent(*each) for each in zip(names, own, added, strict=True)]


@contextmanager
def _no_meetings() -> Iterator[None]:
    """Ranks that go on without each other; what they compute is then wrong."""
    with (
        mock.patch.object(GpuRanks, "few_rows", None),
        mock.patch.object(GpuRanks, "one_row", None),
        mock.patch.object(GpuRanks, "sum", lambda self, x: x),
        mock.patch.object(GpuRanks, "from_first", lambda self, x: x),
        mock.patch.object(GpuRanks, "gather_logits", lambda self, part, vocab_size: part),
    ):
        yield


def _through(layers: Sequence[DecoderLayer], call: Callable[[DecoderLayer], object]) -> None:
    for layer in layers:
        call(layer)


def _again(call: Callable[[torch.Tensor], object], x: torch.Tensor) -> None:
    for _ in range(STEPS):
        call(x)


def _reduced(ranks: GpuRanks, x: torch.Tensor) -> None:
    ranks._group.allreduce([x]).wait()


def _own(matrix: Matrix) -> Matrix:
    return matrix.own if isinstance(matrix, SummedMatrix) else matrix


def run_first(size: int, arguments: argparse.Namespace, words: Sequence[str]) -> list[str]:
    """Starts the others, and measures with them."""
    channels, others = [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(1, size):
            ours, theirs = socket.socketpair()
            command = [sys.executable, "-m", "benchmarks.rank_profile", *words]
            others.append(
                subprocess.Popen(
                    [*command, "--channel", str(theirs.fileno())], pass_fds=(theirs.fileno(),)
                )
            )
            theirs.close()
            channels.append(Channel(ours))
            channels[-1].send_note(rank=rank, size=size, folder=folder)
        try:
            with closing(Place(Shard(0, size), FirstRank(channels), folder, arguments)) as place:
                lines = shown(place)
            for each in others:
                each.wait(30)
        finally:
            for each in others:
                each.kill()
    return lines


def run_other(arguments: argparse.Namespace) -> None:
    channel = Channel(socket.socket(fileno=arguments.channel))
    orders = channel.receive_note()
    shard = Shard(orders["rank"], orders["size"])
    with closing(Place(shard, OtherRank(channel), orders["folder"], arguments)) as place:
        lines = list(place.measure())
    print("\n".join(lines), flush=True)


def shown(place: Place) -> list[str]:
    lines = []
    for line in place.measure():
        print(line, flush=True)
        lines.append(line)
    return lines


def main() -> int:
    parser = parser_of("rank_profile", __doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="GPUS")
    parser.add_argument("--decode", type=int, nargs="+", default=[1], metavar="SEQUENCES")
    parser.add_argument("--context", type=int, default=1100)
    parser.add_argument("--channel", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if torch.cuda.device_count() < max(arguments.ranks):
        print("these figures need a GPU for each rank", file=sys.stderr)
        return 1
    with torch.inference_mode():
        if arguments.channel is not None:
            run_other(arguments)
            sys.stdout.flush()
            os._exit(0)  # what libraries do at the end of a process would wait for rank 0
        lines = []
        for size in arguments.ranks:
            lines += ["", *run_first(size, arguments, sys.argv[1:])]
            gc.collect()
            torch.cuda.empty_cache()
    if arguments.write:
        title = "Kernels of a decode step that GPUs share"
        publish("rank_profile", "rank profile", title, "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
