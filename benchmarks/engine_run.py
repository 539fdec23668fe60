"""One engine driven as a node drives it, by its scheduler and loop, with what it took.

1. `EngineRun` starts the engine's thread over a decode node's scheduler, which prefills too.
2. `first_token_seconds`: one prompt, from being added to its first token.
3. `decode_seconds`: prompts are prefilled until all decode; then the time from each step's
   tokens to the next step's, while nothing but decode steps runs.
4. Prompts never repeat, and prefix caching is off.
"""

from __future__ import annotations

import gc
import itertools
import math
import queue
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks.kernels.timing import median_seconds
from cluster.prefix_hash import root_hash
from cluster.request import SamplingParams, SequenceRequest, TokenDelta
from decode_node.scheduler import DecodeScheduler
from engine.loop import EngineLoop
from engine.sequence import Sequence

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.engine import Engine
    from engine.schedule import ScheduleDecision
    from engine.step_pipeline import StepOutput

STEP_SECONDS = 120.0
WARM_UP_STEPS = 8
STEPS_ALONE = 10
# log(1 / vocabulary) is what a model without any opinion gives; training gives more than this.
LEAST_TOP_LOGPROB, MOST_TOP_LOGPROB = -11.0, -0.05


@dataclass(frozen=True, slots=True)
class Settled:
    """What one step gave, and when."""

    seconds: float
    deltas: tuple[TokenDelta, ...]


@dataclass(frozen=True, slots=True)
class DecodeTimes:
    """`steps`: seconds of each. `on_device`: what its graphs take alone; None without graphs.
    `context`: tokens of a sequence, in the mean of all and of the steps."""

    steps: list[float]
    context: float
    on_device: float | None

    @property
    def idle_share(self) -> float | None:
        """Share of a step in which the GPU does not run its graphs."""
        if self.on_device is None:
            return None
        return max(0.0, 1.0 - self.on_device / statistics.median(self.steps))


class _Recorder:
    def __init__(self) -> None:
        self.steps: queue.SimpleQueue[Settled] = queue.SimpleQueue()

    def before_step(self, decision: ScheduleDecision) -> None: ...
    def after_step(self, decision: ScheduleDecision, output: StepOutput) -> None: ...

    def idle(self) -> None:
        pass

    def settled(self, deltas: SequenceOf[TokenDelta]) -> None:
        self.steps.put(Settled(time.perf_counter(), tuple(deltas)))


class EngineRun:
    """A context manager; one for each engine."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self._numbers = itertools.count(seed << 20)
        self._recorder = _Recorder()
        self._scheduler = DecodeScheduler(
            engine.block_manager, engine.max_num_batched_tokens, engine.max_num_seqs
        )
        self._errors: list[BaseException] = []
        self._loop = EngineLoop(
            engine, self._scheduler, self._recorder, on_fatal=self._errors.append
        )

    def __enter__(self) -> EngineRun:
        gc.collect()
        gc.freeze()  # as a node does when it is ready
        self._loop.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.stop()
        gc.unfreeze()

    def first_token_seconds(self, num_tokens: int) -> float:
        sequence = self._sequence(num_tokens)
        began = time.perf_counter()
        self._loop.call(lambda: self._scheduler.add(sequence))
        while not (step := self._next()).deltas:
            pass
        self.clear()
        return step.seconds - began

    def decode(self, num_seqs: int, context: int, steps: int) -> DecodeTimes:
        """As `decode_seconds`, and what the graphs take alone. Not for several ranks, whose
        graphs wait for each other."""
        times, mean_context = self._decode(num_seqs, context, steps)
        on_device = self._loop.call(lambda: self._graph_seconds(num_seqs)).result(STEP_SECONDS)
        self.clear()
        return DecodeTimes(times, mean_context, on_device)

    def decode_seconds(self, num_seqs: int, context: int, steps: int) -> list[float]:
        """Of each of `steps` steps of `num_seqs` sequences with `context` tokens or more."""
        times, _ = self._decode(num_seqs, context, steps)
        self.clear()
        return times

    def _decode(self, num_seqs: int, context: int, steps: int) -> tuple[list[float], float]:
        """Seconds of each step, and the mean context they attend to."""
        drawn = self.start_decode(num_seqs, context)
        return self.step_seconds(steps), context + drawn / num_seqs + steps / 2

    @property
    def is_busy(self) -> bool:
        return self._loop.is_busy

    def forget_steps(self) -> None:
        """What was not asked for."""
        while not self._recorder.steps.empty():
            self._next()

    def step_seconds(self, steps: int) -> list[float]:
        """Of each of the next `steps` steps."""
        times = [self._next().seconds for _ in range(steps + 1)]
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    def _graph_seconds(self, num_seqs: int) -> float | None:
        """Of the graphs of the last step, run again and again with nothing between."""
        graphs = self.engine._runner._graphs
        if graphs is None or num_seqs > graphs.max_rows:
            return None
        num_rows = graphs.padded(num_seqs)

        def step() -> None:
            graphs.replay(num_rows)
            graphs.replay_draw(num_rows, only_best=True)

        def steps() -> None:
            for _ in range(STEPS_ALONE):
                step()

        with torch.inference_mode():
            return median_seconds(steps, repeats=5) / STEPS_ALONE

    def check_is_realistic(self, num_seqs: int) -> str:
        """Dummy weights must compute something: finite, with opinions that differ by prompt.

        Raises `RuntimeError` where they do not: such a run would measure nothing.
        """
        sequences = [self._sequence(64, num_logprobs=1) for _ in range(num_seqs)]
        self._add(sequences)
        first: dict[str, TokenDelta] = {}
        while len(first) < num_seqs:
            for delta in self._next().deltas:
                first.setdefault(delta.sequence_id, delta)
        self.clear()
        tokens = {delta.token_ids for delta in first.values()}
        logprobs = [delta.logprobs[0].logprob for delta in first.values()]
        low, high = min(logprobs), max(logprobs)
        is_sane = all(map(math.isfinite, logprobs))
        is_sane = is_sane and low > LEAST_TOP_LOGPROB and high < MOST_TOP_LOGPROB
        said = f"{len(tokens)} tokens of {num_seqs} prompts, logprobs {low:.2f} to {high:.2f}"
        if not is_sane or len(tokens) < num_seqs // 2:
            raise RuntimeError(f"the weights do not behave like a model's: {said}")
        return said

    def start_decode(self, num_seqs: int, context: int) -> int:
        """Until all decode and the first steps of theirs are over. Tokens drawn meanwhile."""
        self._add([self._sequence(context) for _ in range(num_seqs)])
        in_full = drawn = 0
        while in_full < WARM_UP_STEPS:
            deltas = self._next().deltas
            in_full += len(deltas) == num_seqs
            drawn += sum(len(delta.token_ids) for delta in deltas)
        return drawn

    def _next(self) -> Settled:
        step = self._recorder.steps.get(timeout=STEP_SECONDS)
        for delta in step.deltas:
            if delta.error is not None:
                raise delta.error
        if self._errors:
            raise self._errors[0]
        return step

    def _add(self, sequences: SequenceOf[Sequence]) -> None:
        """All in one go: no step runs before the last."""

        def add() -> None:
            for sequence in sequences:
                self._scheduler.add(sequence)

        self._loop.call(add)

    def clear(self) -> None:
        """End all sequences, and forget what they still gave."""

        def abort() -> None:
            for sequence in self._scheduler.sequences():
                self._scheduler.abort(sequence.sequence_id)

        self._loop.call(abort).result(STEP_SECONDS)
        self._loop.call(lambda: None).result(STEP_SECONDS)
        while not self._recorder.steps.empty():
            self._recorder.steps.get()

    def _sequence(self, num_tokens: int, num_logprobs: int | None = None) -> Sequence:
        """A prompt that no earlier one begins like."""
        number = next(self._numbers)
        generator = torch.Generator().manual_seed(number)
        vocabulary = self.engine.model_config.vocab_size
        prompt = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
        request = SequenceRequest(
            sequence_id=f"s{number}",
            request_id=f"r{number}",
            prompt_token_ids=tuple(prompt.tolist()),
            sampling=SamplingParams(
                max_tokens=1 << 20,
                seed=0,
                temperature=0.0,
                ignore_eos=True,
                num_logprobs=num_logprobs,
            ),
        )
        root = root_hash("bench", b"")
        return Sequence(request, block_size=self.engine.config.block_size, root=root)
