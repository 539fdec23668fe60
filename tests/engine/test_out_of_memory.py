"""A step that finds no memory, wherever it allocates, ends typed and leaves the engine whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.errors import OutOfMemory
from cluster.prefix_hash import root_hash
from cluster.request import SamplingParams, SequenceRequest
from engine.out_of_memory import run_within_memory
from engine.schedule import ScheduledChunk, ScheduleDecision
from engine.sequence import Sequence

if TYPE_CHECKING:
    from engine.engine import Engine
    from tests.engine.conftest import OpenEngine


class FailingAllocator(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Has no memory left for the tensor of operation number `fail_at`."""

    def __init__(self, fail_at: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fail_at = fail_at
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        if self.count == self.fail_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return func(*args, **(kwargs or {}))


def start(engine: Engine, name: str) -> Sequence:
    request = SequenceRequest(
        sequence_id=name,
        request_id=name,
        prompt_token_ids=(5, 3, 1, 2, 7, 7, 1),
        sampling=SamplingParams(max_tokens=8, seed=0, temperature=0.0, ignore_eos=True),
    )
    return Sequence(request, block_size=engine.config.block_size, root=root_hash("m", b""))


def step(engine: Engine, sequence: Sequence) -> None:
    assert engine.block_manager.allocate(sequence, sequence.num_tokens)
    length = sequence.num_uncomputed_tokens
    engine.step(ScheduleDecision((ScheduledChunk(sequence, length),)))


@pytest.mark.parametrize("num_steps_before", [0, 2])
def test_no_allocation_of_a_step_can_hurt_the_next(
    num_steps_before: int, open_engine: OpenEngine
) -> None:
    """`num_steps_before` 0: the step that fails computes a prompt, else it decodes."""
    engine = open_engine("llama3", enable_prefix_caching=False)
    outputs = []
    for name in ("first", "reference"):  # the first also makes what is made once
        reference = start(engine, name)
        with FailingAllocator(0) as counting:
            for _ in range(num_steps_before + 1):
                counting.count = 0
                step(engine, reference)
        engine.block_manager.free(reference)
        outputs.append(reference.output_token_ids)
    assert outputs[0] == outputs[1]
    assert counting.count > 10
    for fail_at in range(1, counting.count + 1):
        victim = start(engine, f"v{fail_at}")
        for _ in range(num_steps_before):
            step(engine, victim)
        with FailingAllocator(fail_at), pytest.raises(OutOfMemory):
            step(engine, victim)
        engine.block_manager.free(victim)
        engine.block_manager.check_integrity()
    again = start(engine, "again")
    for _ in range(num_steps_before + 1):
        step(engine, again)
    assert again.output_token_ids == reference.output_token_ids
    engine.block_manager.free(again)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: no"),
        MemoryError(),
    ],
)
def test_each_way_to_say_it_is_understood(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(OutOfMemory) as refused:
        run_within_memory(fail)
    assert refused.value.reason == "out_of_memory"
    # The step's frames, and the tensors they hold, are not kept alive.
    assert refused.value.__context__ is None


def test_other_errors_stay_what_they_are() -> None:
    def fail() -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        run_within_memory(fail)
