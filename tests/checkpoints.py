"""Real checkpoints for every room's tests, and what `transformers` generates from them.

A plugin of `tests/conftest.py`: the checkpoints are written once per test session.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.startup import StartupReport
from engine.config import EngineConfig

if TYPE_CHECKING:
    from engine.engine import Engine

Expected = dict[str, list[dict[str, list[int]]]]
OpenEngine = Callable[..., "Engine"]

REPOSITORY = Path(__file__).resolve().parents[1]
POCKET_MODEL = "pocket_model"
FAMILIES = (
    "llama3",
    "llama_biased_tied",
    "mistral",
    "qwen2",
    "qwen2_yarn_windows",
    "qwen3",
    "qwen3_untied",
)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one tiny checkpoint per family, the pocket model, and what `transformers`
    generates from each."""
    folder = tmp_path_factory.mktemp("checkpoints")
    pocket = folder / POCKET_MODEL
    pocket.symlink_to(REPOSITORY / "baton" / "pocket_model", target_is_directory=True)
    script = Path(__file__).with_name("engine") / "transformers_reference.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", str(script), str(folder), str(pocket)],
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
