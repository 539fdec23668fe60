"""What `baton doctor` looks at on this machine.

Each check runs on its own; what could crash (torch, UCX) runs in a process of its own. A check
answers ok, warning or problem, and says in one line what it saw.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from baton.embedded_redis import find_redis_server
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PROBE_SECONDS = 60.0
# What takes each, and the flag that names another.
DEFAULT_PORTS = {
    8000: "public HTTP of a gateway: --port",
    8001: "admin API of a gateway: --admin-port",
    9100: "gRPC of a node: --port",
    9200: "KV of a node: --kv-port",
    9400: "metrics of a node: --metrics-port",
}
MIN_SHM_BYTES = 1 << 30


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    subject: str
    verdict: Verdict
    detail: str


def examine() -> list[Finding]:
    checks: tuple[Callable[[], list[Finding]], ...] = (
        check_python,
        lambda: probe("torch"),
        lambda: probe("ucx"),
        check_redis,
        check_ports,
        check_limits,
    )
    return [finding for check in checks for finding in check()]


def check_python() -> list[Finding]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return [Finding("Python", Verdict.OK, version)]


def probe(name: str) -> list[Finding]:
    """Findings of `baton.doctor_probe NAME`, run apart: a crash there is a finding here."""
    command = [sys.executable, "-m", "baton.doctor_probe", name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return [Finding(name, Verdict.PROBLEM, f"no answer within {PROBE_SECONDS:.0f} s")]
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return [Finding(name, Verdict.PROBLEM, f"exit code {done.returncode}: {last}")]
    return read_rows(name, done.stdout)


def read_rows(name: str, output: str) -> list[Finding]:
    """The findings in a probe's last line; libraries may have printed before it."""
    try:
        rows = json.loads((output.splitlines() or [""])[-1])
        return [Finding(str(subject), Verdict(word), str(detail)) for subject, word, detail in rows]
    except (ValueError, TypeError):
        return [Finding(name, Verdict.PROBLEM, "the probe did not answer in its own words")]


def check_redis() -> list[Finding]:
    try:
        binary = find_redis_server()
    except ConfigError as error:
        detail = f"{error.message} Only `baton serve` starts one."
        return [Finding("Redis", Verdict.WARNING, detail)]
    return [Finding("Redis", Verdict.OK, f"{binary} (for `baton serve` without --redis-url)")]


def check_ports() -> list[Finding]:
    findings = []
    for port, use in DEFAULT_PORTS.items():
        with socket.socket() as probe_socket:
            probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe_socket.bind(("127.0.0.1", port))
            except OSError:
                detail = f"{port} is in use ({use} takes another)"
                findings.append(Finding("Port", Verdict.WARNING, detail))
    free = ", ".join(map(str, DEFAULT_PORTS))
    return findings or [Finding("Ports", Verdict.OK, f"{free} are free")]


def check_limits() -> list[Finding]:
    findings = []
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    verdict = Verdict.OK if files >= 4096 else Verdict.WARNING
    findings.append(Finding("Open files", verdict, f"limit {files}"))
    if os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free
        verdict = Verdict.OK if free >= MIN_SHM_BYTES else Verdict.WARNING
        findings.append(Finding("/dev/shm", verdict, f"{free / (1 << 30):.1f} GiB free"))
    return findings


def finding_table(findings: Sequence[Finding]) -> Table:
    styles = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.PROBLEM: "red"}
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "verdict", "what was seen"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        style = styles[finding.verdict]
        table.add_row(
            escape(finding.subject), f"[{style}]{finding.verdict}[/{style}]", escape(finding.detail)
        )
    return table
