from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from loadtest.metadata import collect_metadata, cpu_model, git_commit, parse_gpus

if TYPE_CHECKING:
    from pathlib import Path


def test_metadata_of_this_machine_is_whole_and_json_ready() -> None:
    metadata = json.loads(json.dumps(collect_metadata().as_dict()))
    assert metadata["num_cores"] >= 1
    assert metadata["memory_bytes"] > 0
    assert metadata["cpu_model"]
    assert "baton-serve" in metadata["packages"]


def test_collecting_metadata_does_not_load_torch() -> None:
    program = (
        "import sys; from loadtest.metadata import collect_metadata; collect_metadata(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_processor_is_named_as_the_kernel_names_it(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Fast CPU @ 3 GHz\nflags\t: x\n")
    assert cpu_model(cpuinfo) == "Fast CPU @ 3 GHz"


def test_gpus_are_read_from_the_listing_and_odd_lines_are_skipped() -> None:
    listing = "NVIDIA H200, 143771 MiB, 580.1, 1980 MHz, 700.00 W\nfailed to read\n"
    (gpu,) = parse_gpus(listing)
    assert gpu["name"] == "NVIDIA H200"
    assert gpu["power.limit"] == "700.00 W"


def test_a_commit_with_changed_files_is_marked(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, "-C", str(tmp_path), *arguments], check=True)

    assert git_commit(tmp_path) == ""
    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    clean = git_commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == f"{clean}-dirty"
