"""A real engine with host memory below its pool: what comes back from there changes no token."""

from __future__ import annotations

import threading
from functools import partial
from queue import SimpleQueue
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from cluster.errors import InternalError
from cluster.prefix_hash import root_hash
from cluster.request import SamplingParams, SequenceRequest
from decode_node.scheduler import DecodeScheduler
from engine.block_copies import CopyKind
from engine.loop import EngineLoop
from engine.sequence import Sequence

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Sequence as SequenceOf

    from cluster.request import TokenDelta
    from engine.engine import Engine
    from engine.host_blocks import HostBlocks
    from tests.checkpoints import OpenEngine

NUM_BLOCKS = 24
PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Served:
    """An engine's loop, and what it told of each sequence."""

    def __init__(self, engine: Engine, *, max_num_seqs: int = 8) -> None:
        self.engine = engine
        self.errors: list[BaseException] = []
        self.told: dict[str, list[int]] = {}
        self.scheduler = DecodeScheduler(
            engine.block_manager,
            engine.max_num_batched_tokens,
            max_num_seqs,
            max_model_len=engine.max_model_len,
        )
        self.loop = EngineLoop(
            engine,
            self.scheduler,
            self,
            on_fatal=self.errors.append,
            start_copies=engine.start_copies,
        )
        self._waiting: dict[str, threading.Event] = {}
        self.loop.start()

    @property
    def host(self) -> HostBlocks:
        assert self.engine.block_manager.host is not None
        return self.engine.block_manager.host

    def before_step(self, decision: object) -> None: ...
    def after_step(self, decision: object, output: object) -> None: ...

    def idle(self) -> None:
        pass

    def settled(self, deltas: SequenceOf[TokenDelta]) -> None:
        for delta in deltas:
            assert delta.error is None
            self.told[delta.sequence_id] += delta.token_ids
            if delta.finish_reason is not None:
                self._waiting[delta.sequence_id].set()

    def run(self, prompts: list[list[int]], num_tokens: int, **sampling: Any) -> list[Sequence]:
        """All at once; returns when each has ended."""
        sequences = [
            start(self.engine, f"{len(self.told) + index}", prompt, index, num_tokens, sampling)
            for index, prompt in enumerate(prompts)
        ]
        for sequence in sequences:
            self.told[sequence.sequence_id] = []
            self._waiting[sequence.sequence_id] = threading.Event()
        for sequence in sequences:
            self.loop.call(partial(self.scheduler.add, sequence))
        for sequence in sequences:
            assert self._waiting[sequence.sequence_id].wait(60), self.errors
        self.settle()
        return sequences

    def settle(self) -> None:
        """Until no copy runs."""
        done = threading.Event()

        def look() -> None:
            self.loop._start_copies()
            if self.host.tier.num_moving or self.host.num_copies:
                self.loop.call(look)
            else:
                done.set()

        if self.engine.block_manager.host is not None:
            self.loop.call(look)
            assert done.wait(60)

    def close(self) -> None:
        self.loop.stop()
        manager = self.engine.block_manager
        manager.check_integrity()
        assert not self.errors
        assert manager.num_free_blocks == manager.num_blocks, manager.owners()


def start(
    engine: Engine, name: str, prompt: list[int], seed: int, num_tokens: int, sampling: Any
) -> Sequence:
    settings = {"max_tokens": num_tokens, "seed": seed, "ignore_eos": True} | sampling
    return Sequence(
        SequenceRequest(
            sequence_id=name,
            request_id=name,
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(**settings),
        ),
        block_size=engine.config.block_size,
        root=root_hash("test", b""),
    )


@pytest.fixture(params=PLACES, scope="module")
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def roomy(open_engine: OpenEngine, device: str) -> Iterator[Engine]:
    """No need for a second tier."""
    engine = open_engine("qwen3", device=device, max_model_len=256)
    yield engine
    engine.close()


@pytest.fixture
def small(open_engine: OpenEngine, device: str) -> Iterator[Engine]:
    engine = open_engine(
        "qwen3",
        device=device,
        max_model_len=256,
        num_gpu_blocks_override=NUM_BLOCKS,
        kv_offloading_size=0.01,
    )
    yield engine
    engine.close()


def tokens_of(sequences: list[Sequence]) -> list[list[int]]:
    return [sequence.output_token_ids for sequence in sequences]


def prompt(first: int, length: int) -> list[int]:
    return [(first * 31 + 7 * index) % 200 + 10 for index in range(length)]


def expected(roomy: Engine, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    served = Served(roomy)
    try:
        return tokens_of(served.run(prompts, num_tokens, temperature=0.8))
    finally:
        roomy.block_manager.reset_prefix_cache()
        served.close()


def test_a_prompt_that_was_evicted_comes_back_without_being_computed(
    small: Engine, roomy: Engine
) -> None:
    first, other = prompt(1, 200), prompt(2, 220)
    wanted = expected(roomy, [first], 4)
    served = Served(small)
    served.run([first], 4, temperature=0.8)
    served.run([other], 4, temperature=0.8)  # takes 14 of the 24 blocks
    computed = served.loop.stats.num_computed_tokens
    again = served.run([first], 4, temperature=0.8)
    assert tokens_of(again) == wanted
    assert again[0].num_cached_tokens == 192
    assert served.loop.stats.num_computed_tokens - computed == 200 - 192 + 3
    assert served.host.stats.num_hit_tokens > 0
    served.close()


def test_a_block_that_changed_in_host_memory_is_computed_again(
    small: Engine, roomy: Engine
) -> None:
    first, other = prompt(1, 200), prompt(2, 220)
    wanted = expected(roomy, [first], 4)
    served = Served(small)
    served.run([first], 4, temperature=0.8)
    served.run([other], 4, temperature=0.8)
    assert small.copier is not None
    small.copier.slots[:, 17] ^= 1
    again = served.run([first], 4, temperature=0.8)
    assert tokens_of(again) == wanted
    assert served.host.stats.num_bad_blocks == 1
    assert served.host.stats.num_hit_tokens == 0
    served.close()


def test_a_copy_that_fails_costs_time_and_no_token(
    small: Engine, roomy: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = prompt(1, 200), prompt(2, 220)
    wanted = expected(roomy, [first], 4)
    served = Served(small)
    served.run([first], 4, temperature=0.8)
    served.run([other], 4, temperature=0.8)

    def fail(*arguments: object) -> None:
        raise RuntimeError("out of order")

    assert small.copier is not None
    monkeypatch.setattr(small.copier, "_unpack", fail)
    stats = small.copier.stats[CopyKind.LOAD]
    num_bytes = stats.num_bytes
    assert tokens_of(served.run([first], 4, temperature=0.8)) == wanted
    assert served.host.stats.num_failed_copies == 1
    assert stats.num_bytes == num_bytes, "what was not copied says nothing of the bus"
    served.close()


def test_a_device_that_is_lost_in_a_copy_ends_the_node(
    small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step finds out: the one sequence here waits for that copy."""
    first, other = prompt(1, 200), prompt(2, 220)
    served, lost = Served(small), SimpleQueue[BaseException]()
    small.watch(lost.put)
    served.run([first], 4)
    served.run([other], 4)

    def fail(*arguments: object) -> None:
        raise RuntimeError("the device does nothing any more but raise")

    assert small.copier is not None
    lane = SimpleNamespace(stream=SimpleNamespace(synchronize=fail))
    monkeypatch.setattr(small.copier, "_unpack", fail)
    monkeypatch.setitem(small.copier._lanes, CopyKind.LOAD, (lane,))
    waiting = start(small, "waiting", first, 0, 4, {})
    served.loop.call(partial(served.scheduler.add, waiting))
    assert isinstance(lost.get(timeout=60), InternalError)
    served.loop.stop()
    assert served.host.num_copies == 1, "what it may still write was taken back"


def test_preempted_sequences_come_back_from_host_memory_with_the_same_tokens(
    small: Engine, roomy: Engine
) -> None:
    prompts = [prompt(10 + index, 20 + 3 * index) for index in range(8)]
    wanted = expected(roomy, prompts, 70)
    served = Served(small)
    sequences = served.run(prompts, 70, temperature=0.8)
    assert tokens_of(sequences) == wanted
    assert sum(sequence.num_preemptions for sequence in sequences) > 0
    assert served.host.stats.num_loaded_blocks > 0
    num_prompt_tokens = sum(len(each) for each in prompts)
    num_needed = num_prompt_tokens + 69 * len(prompts)
    assert served.loop.stats.num_computed_tokens < num_needed * 1.1, "they were computed again"
    served.close()


def test_a_reset_empties_host_memory_too(small: Engine) -> None:
    first, other = prompt(1, 200), prompt(2, 220)
    served = Served(small)
    served.run([first], 4)
    served.run([other], 4)
    assert served.host.tier.num_ready > 0
    served.loop.call(small.block_manager.reset_prefix_cache).result(60)
    assert served.host.tier.num_ready == 0
    again = served.run([first], 4)
    assert again[0].num_cached_tokens == 0
    served.close()
