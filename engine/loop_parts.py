"""What the loop of an engine needs of others, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf
    from concurrent.futures import Future

    from cluster.request import TokenDelta
    from engine.schedule import ScheduleDecision
    from engine.sequence import Sequence
    from engine.step_pipeline import StepOutput


class Launched(Protocol):
    """A step that the engine was given and has not given back."""

    @property
    def can_be_followed(self) -> bool:
        """Whether another may be launched before it is collected."""
        ...


@dataclass(slots=True)
class Flight:
    """A launched step, and when the device could begin with it: with the first of what the launch
    queues. On a CPU the launch is the step."""

    decision: ScheduleDecision
    step: Launched
    began: float


class Stepper(Protocol):
    """What the loop needs of an engine. When `collect` raises, no step is in flight."""

    def launch(
        self, decision: ScheduleDecision, *, on_layer: Callable[[int], None] | None = None
    ) -> Launched: ...

    def collect(self, step: Any) -> StepOutput:
        """`step`: the oldest that `launch` gave."""
        ...


class Scheduler(Protocol):
    """Decides which sequences run next. Called on the loop's thread only."""

    def add(self, sequence: Sequence) -> None: ...
    def abort(self, sequence_id: str) -> Sequence | None: ...
    def schedule(self) -> ScheduleDecision:
        """The next step; nothing is in flight."""
        ...

    def schedule_ahead(self) -> ScheduleDecision | None:
        """The step after the one in flight, whose tokens are not known. None if that cannot be
        decided yet. Preempts nobody and fails nobody."""
        ...

    def update(self, output: StepOutput) -> list[Sequence]: ...
    def has_work(self) -> bool: ...


class Observer(Protocol):
    """Hears of each step on the loop's thread; must not block."""

    def before_step(self, decision: ScheduleDecision) -> None: ...
    def after_step(self, decision: ScheduleDecision, output: StepOutput) -> None: ...
    def settled(self, deltas: SequenceOf[TokenDelta]) -> None: ...
    def idle(self) -> None:
        """No step can be launched until a command comes; the last ones may have freed blocks."""


class StartCopies(Protocol):
    """Starts what copies the last decision asks for. `call` is that of the loop."""

    def __call__(self, call: Callable[[Callable[[], None]], Future[None]], /) -> None: ...


class LayerHook(Protocol):
    """Gives the function that hears, on the loop's thread, when layer i's KV is written (GPU:
    queued); None if nobody needs to. Called after `before_step`."""

    def __call__(self, decision: ScheduleDecision, /) -> Callable[[int], None] | None: ...


@dataclass(slots=True)
class LoopStats:
    """Counters since start. Written by the loop's thread; readers see values a moment old."""

    num_steps: int = 0
    step_seconds: float = 0.0
    num_failed_steps: int = 0
    num_computed_tokens: int = 0
    num_sampled_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    def count(self, decision: ScheduleDecision, output: StepOutput, seconds: float) -> None:
        self.num_steps += 1
        self.step_seconds += seconds
        self.num_computed_tokens += decision.num_scheduled_tokens
        self.num_preemptions += len(decision.preempted)
        self.num_sampled_tokens += len(output.sampled_sequences)
        self.num_cached_tokens += sum(delta.num_cached_tokens or 0 for delta in output.deltas)
