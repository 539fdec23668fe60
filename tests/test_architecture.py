"""The contract on imports holds, and the generated code is what the proto files say."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_imports_point_down() -> None:
    result = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def test_the_gateway_starts_without_torch() -> None:
    code = "import sys, gateway.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_name_kernels_belongs_to_this_distribution_alone() -> None:
    assert set(packages_distributions()["kernels"]) == {"baton-serve"}
