"""What a program says, and how it exits, when its model cannot be what it was asked to be."""

from __future__ import annotations

import subprocess
import sys

import pytest

from baton.__main__ import EXIT_CONFIG
from tests.checkpoints import REPOSITORY

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_a_quantisation_that_the_checkpoint_does_not_have_is_a_start_up_error(program: str) -> None:
    model = REPOSITORY / "baton" / "pocket_model"
    done = subprocess.run(
        [sys.executable, "-m", "baton", program, str(model), "--quantization", "awq"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == EXIT_CONFIG
    said = [line for line in done.stderr.splitlines() if line.startswith("baton")]
    assert said == [f"baton {program}: --quantization awq: the checkpoint is not quantized."]
    assert "Traceback" not in done.stderr
