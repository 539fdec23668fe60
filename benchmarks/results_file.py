"""benchmarks/RESULTS.md: each program replaces its own section, between two markers.

Beside its table a section holds the command, and the machine and versions it was measured with.
"""

from __future__ import annotations

from pathlib import Path

from loadtest.metadata import collect_metadata

RESULTS = Path(__file__).parent / "RESULTS.md"


def write_section(name: str, title: str, text: str, *, path: Path = RESULTS) -> None:
    """Replace what stands between the markers of `name`; without them, add a section at the end."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before = path.read_text() if path.exists() else "# Results\n"
    section = f"{begin}\n{text}\n{end}"
    if begin in before and end in before:
        head, _, rest = before.partition(begin)
        after = head + section + rest.partition(end)[2]
    else:
        after = before.rstrip("\n") + f"\n\n## {title}\n\n{section}\n"
    path.write_text(after)


def machine_facts() -> list[str]:
    """Date, commit, machine and versions, one sentence each."""
    metadata = collect_metadata()
    versions = ", ".join(f"{name} {value}" for name, value in metadata.packages.items())
    facts = [
        f"date: {metadata.date}, commit {metadata.git_commit or 'unknown'}",
        f"machine: {metadata.cpu_model}, {metadata.num_cores} cores, "
        f"{metadata.memory_bytes / 2**30:.0f} GiB, {metadata.platform}",
        f"Python {metadata.python}; {versions}",
    ]
    if metadata.gpus:
        facts.append("GPU: " + "; ".join(", ".join(gpu.values()) for gpu in metadata.gpus))
    return facts
