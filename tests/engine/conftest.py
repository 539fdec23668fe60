"""What tests of a whole engine share: tiny real checkpoints and a greedy driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.prefix_hash import root_hash
from cluster.request import SamplingParams, SequenceRequest
from cluster.startup import StartupReport
from engine.config import EngineConfig
from engine.schedule import ScheduledChunk, ScheduleDecision
from engine.sequence import Sequence

if TYPE_CHECKING:
    from engine.engine import Engine

Expected = dict[str, list[dict[str, list[int]]]]
OpenEngine = Callable[..., "Engine"]
RunGreedy = Callable[..., list[Sequence]]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one tiny checkpoint per family, and what `transformers` generates from each."""
    folder = tmp_path_factory.mktemp("checkpoints")
    script = Path(__file__).with_name("transformers_reference.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", str(script), str(folder)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"transformers_reference.py failed:\n{done.stderr[-4000:]}")
    return folder


@pytest.fixture(scope="session")
def expected(checkpoints: Path) -> Expected:
    """`{family: [{"prompt": [...], "tokens": [...]}]}`, the reference's greedy tokens."""
    cases: Expected = json.loads((checkpoints / "expected.json").read_text())
    return cases


@pytest.fixture(scope="session")
def open_engine(checkpoints: Path) -> OpenEngine:
    """`open_engine("qwen3", max_num_seqs=4)`: a small float32 engine on the CPU."""

    from engine.engine import Engine  # tests of this folder that need no torch stay quick

    def open_engine(family: str, **options: Any) -> Engine:
        settings: dict[str, Any] = {
            "model": checkpoints / family,
            "device": "cpu",
            "dtype": "float32",
            "max_model_len": 1024,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 1024,
            "num_threads": 1,
        }
        config = EngineConfig(**settings | options)
        return Engine.create(config, progress=StartupReport(sink=lambda fact: None))

    return open_engine


@pytest.fixture(scope="session")
def run_greedy() -> RunGreedy:
    return _run_greedy


def _run_greedy(
    engine: Engine, prompts: Iterable[list[int]], *, chunk: int, num_tokens: int
) -> list[Sequence]:
    """Run prompts together as a scheduler would: chunks of at most `chunk` tokens in a step,
    then decode. The sequences come back finished, their blocks freed."""
    sequences = [
        Sequence(
            SequenceRequest(
                sequence_id=f"s{index}",
                request_id=f"r{index}",
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(
                    max_tokens=num_tokens, seed=0, temperature=0.0, ignore_eos=True
                ),
            ),
            block_size=engine.config.block_size,
            root=root_hash("test", b""),
        )
        for index, prompt in enumerate(prompts)
    ]
    running = list(sequences)
    while running:
        engine.step(_decide(engine, running, chunk))
        for sequence in [each for each in running if each.is_finished]:
            running.remove(sequence)
            engine.block_manager.free(sequence)
    engine.block_manager.check_integrity()
    return sequences


def _decide(engine: Engine, running: list[Sequence], chunk: int) -> ScheduleDecision:
    prefilling = [each for each in running if each.num_output_tokens == 0]
    chunks = []
    budget = chunk
    for sequence in prefilling or running:
        if not prefilling:
            budget = 1
        if budget == 0:
            break
        covered = max(1, sequence.num_computed_tokens)
        assert engine.block_manager.allocate(sequence, covered)
        length = min(budget, sequence.num_uncomputed_tokens)
        assert engine.block_manager.allocate(sequence, sequence.num_computed_tokens + length)
        chunks.append(ScheduledChunk(sequence, length))
        budget -= length
    return ScheduleDecision(chunks=tuple(chunks))
