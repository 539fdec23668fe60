"""Where and with what a measurement was made: the run metadata of every report.

`baton doctor` prints it. Without it two figures cannot be compared. Nothing here loads torch:
versions come from the installed packages' own metadata.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = (
    "baton-serve", "torch", "triton", "ucxx-cu13", "ucxx-cu12", "libucx-cu13", "libucx-cu12",
    "grpcio", "redis", "fastapi", "uvicorn", "tokenizers", "safetensors", "aiohttp", "numpy",
)  # fmt: skip
_GPU_FIELDS = ("name", "memory.total", "driver_version", "clocks.max.sm", "power.limit")
_COMMAND_TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class RunMetadata:
    """`git_commit` ends in "-dirty" when files differ from it; empty outside a checkout.

    `num_cores` are those this process may run on. `gpus` is empty without an NVIDIA driver.
    """

    date: str
    git_commit: str
    python: str
    platform: str
    cpu_model: str
    num_cores: int
    memory_bytes: int
    packages: dict[str, str]
    gpus: tuple[dict[str, str], ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def collect_metadata() -> RunMetadata:
    return RunMetadata(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        git_commit=git_commit(Path(__file__).parent),
        python=platform.python_version(),
        platform=platform.platform(),
        cpu_model=cpu_model(),
        num_cores=_num_cores(),
        memory_bytes=_memory_bytes(),
        packages=_package_versions(),
        gpus=list_gpus(),
    )


def git_commit(folder: Path) -> str:
    if shutil.which("git") is None:
        return ""
    commit = _output_of("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD").strip()
    if not commit:
        return ""
    changes = _output_of("git", "-C", str(folder), "status", "--porcelain", "-uno").strip()
    return f"{commit}-dirty" if changes else commit


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if cpuinfo.is_file():
        text = cpuinfo.read_text(errors="replace")
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        if found is not None:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def list_gpus() -> tuple[dict[str, str], ...]:
    """One row per GPU as nvidia-smi tells it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = f"--query-gpu={','.join(_GPU_FIELDS)}"
    return parse_gpus(_output_of(tool, query, "--format=csv,noheader"))


def parse_gpus(listing: str) -> tuple[dict[str, str], ...]:
    rows = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines()]
    return tuple(
        dict(zip(_GPU_FIELDS, row, strict=True)) for row in rows if len(row) == len(_GPU_FIELDS)
    )


def _package_versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _output_of(*command: str) -> str:
    """Standard output, empty when the command fails: metadata never ends a measurement."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
