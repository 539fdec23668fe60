"""`baton doctor`: what is installed on this machine, and whether it works.

    1. Each check runs on its own; what could crash (torch, UCX) runs in a process of its own.
    2. A check answers ok, warning or problem, and says in one line what it saw.
    3. With `--pairs` it also measures how fast KV moves (`doctor_pairs.py`). `--cluster` does so
       between the nodes of a running cluster (`doctor_cluster.py`), and nothing else.
    4. The run metadata that every benchmark report embeds is printed last.

Exit code 0 when there is no problem and all that was asked for was measured, 4 otherwise.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from baton.admin_client import DEFAULT_URL, AdminRefused, AdminUnreachable, admin_client
from baton.admin_tables import shown
from baton.doctor_cluster import LEGEND, PairVerdict, cluster_table, measure_cluster
from baton.doctor_pairs import MeasuredPair, measure_machine, measure_pairs, pair_table
from baton.embedded_redis import find_redis_server
from baton.pair_plan import Plan
from cluster.config import load_config, render_config
from cluster.errors import ConfigError, ServingError
from cluster.options import option, refused
from loadtest.metadata import collect_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXIT_NOT_READY = 4
MAX_PORT = 65535
_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,2})?")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorConfig:
    """Without any of these the doctor looks at this machine, and measures nothing."""

    pairs: bool = option(
        False,
        help="Also measure how fast KV moves between the GPUs, and the processes, of this machine.",
        group="This machine",
    )
    listen: str | None = option(
        None,
        help="Do nothing but wait for --to from other machines (0.0.0.0:9300); Ctrl-C ends it.",
        group="Two machines",
        metavar="HOST:PORT",
    )
    to: str | None = option(
        None,
        help="Also measure how fast KV moves to a machine that listens.",
        group="Two machines",
        metavar="HOST:PORT",
    )
    device: str = option(
        "cpu", help="Where the KV of --listen and --to is: cpu, cuda:0 ...", group="Two machines"
    )
    cluster: bool = option(
        False,
        help="Do nothing but measure how fast KV moves between the nodes of a running cluster.",
        group="A cluster",
    )
    admin_url: str = option(
        DEFAULT_URL,
        help="Where the admin API of that cluster's gateway is.",
        group="A cluster",
        metavar="URL",
    )
    admin_token: str | None = option(
        None,
        help="Its token. Default: what `baton serve` or `baton gateway` has left on this machine "
        "for this user, if it was given none.",
        group="A cluster",
        secret=True,
        metavar="TOKEN",
    )
    output: Literal["table", "json"] = option(
        "table",
        help="json: one object, with the versions of everything.",
        group="Report",
        short="-o",
    )

    def __post_init__(self) -> None:
        for name in ("listen", "to"):
            address = getattr(self, name)
            if address is not None and not _is_address(address):
                raise refused(name, "must be HOST:PORT")
        if _DEVICE.fullmatch(self.device) is None:
            raise refused("device", "must be cpu, cuda or cuda:N")

    @property
    def is_json(self) -> bool:
        return self.output == "json"


def _is_address(text: str) -> bool:
    port = text.rpartition(":")[2]
    return ":" in text and port.isdecimal() and int(port) <= MAX_PORT


def main(argv: Sequence[str]) -> int:
    """Raises `UsageError` and `ConfigError`; the caller prints them."""
    loaded = load_config(
        "baton doctor",
        (DoctorConfig,),
        argv,
        os.environ,
        description="What is installed on this machine, and whether it works.",
    )
    if loaded.show_config:
        print(render_config(loaded), end="")
        return 0
    asked = loaded[DoctorConfig]
    if asked.listen is not None:
        return listen(asked.listen, asked.device)
    if asked.cluster:
        return look_at_cluster(asked.admin_url, asked.admin_token, asked.is_json)
    return look_at_machine(asked)


def look_at_machine(asked: DoctorConfig) -> int:
    findings = examine()
    pairs = measure_pairs() if asked.pairs else []
    if asked.to is not None:
        pairs.append(measure_machine(asked.to, asked.device))
    if asked.is_json:
        facts = {
            "findings": [asdict(finding) for finding in findings],
            "metadata": collect_metadata().as_dict(),
            "pairs": [asdict(pair) for pair in pairs],
        }
        print(json.dumps(facts))
    else:
        show(findings, pairs)
    is_whole = all(pair.rate for pair in pairs)
    is_well = is_whole and not any(f.verdict is Verdict.PROBLEM for f in findings)
    return 0 if is_well else EXIT_NOT_READY


def listen(address: str, device: str) -> int:
    from baton.pair_probe import serve  # which needs torch; a gateway's machine may have none

    host, _, port = address.rpartition(":")
    try:
        serve(Plan(device, device, None, host or "0.0.0.0", int(port)))
    except KeyboardInterrupt:
        return 0
    except ServingError as error:
        print(f"baton doctor: --listen {address}: {error}", file=sys.stderr)
        return EXIT_NOT_READY
    return 0


def look_at_cluster(url: str, token: str | None, as_json: bool) -> int:
    """0 when every pair was measured, whatever its rate."""
    try:
        pairs = measure_cluster(admin_client(url, token))
    except (ConfigError, AdminRefused, AdminUnreachable) as error:
        print(f"baton doctor: --cluster: {shown(error.message)}", file=sys.stderr)
        return EXIT_NOT_READY
    if as_json:
        print(json.dumps({"pairs": [asdict(pair) for pair in pairs]}))
    elif pairs:
        console = Console()
        console.print(cluster_table(pairs))
        console.print(f"\n{LEGEND}", style="dim")
    else:
        print("No prefill node and decode node of this cluster exchange KV.")
    is_whole = all(pair.verdict is not PairVerdict.NOT_MEASURED for pair in pairs)
    return 0 if pairs and is_whole else EXIT_NOT_READY


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
        return [Finding("Redis", Verdict.PROBLEM, error.message)]
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


def show(findings: Sequence[Finding], pairs: Sequence[MeasuredPair]) -> None:
    console = Console()
    styles = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.PROBLEM: "red"}
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "verdict", "what was seen"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        style = styles[finding.verdict]
        table.add_row(
            escape(finding.subject), f"[{style}]{finding.verdict}[/{style}]", escape(finding.detail)
        )
    console.print(table)
    if pairs:
        console.print()
        console.print(pair_table(pairs))
    worst = [finding for finding in findings if finding.verdict is Verdict.PROBLEM]
    names = ", ".join(finding.subject for finding in worst)
    console.print(f"\n{escape(names)}: mend this first." if worst else "\nBaton can run here.")
