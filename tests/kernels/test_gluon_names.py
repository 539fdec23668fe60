"""Gluon's names change from one Triton to the next: the kernels must find those of the one that is
installed, which compiling them for Hopper shows on any machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kernels.gluon_api import HAS_GLUON

NAMES = (
    "thin_linear", "thin_linear_residual", "thin_linear_float8", "thin_gated_linear",
    "thin_gated_linear_float8", "gated_linear", "pair_mlp",
)  # fmt: skip


@pytest.mark.skipif(not HAS_GLUON, reason="no Gluon here")
def test_kernels_compile_with_the_installed_triton() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_gluon", *NAMES],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.stdout.split() == ["compiled", *NAMES], child.stderr
