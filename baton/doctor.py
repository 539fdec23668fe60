"""`baton doctor`: what is installed on this machine, and whether it works.

    1. The machine is examined (`doctor_checks.py`).
    2. With `--pairs` it also measures how fast KV moves (`doctor_pairs.py`). `--cluster` does so
       between the nodes of a running cluster (`doctor_cluster.py`), and nothing else.
    3. The run metadata that every benchmark report embeds is part of the JSON.

Exit code 0 when there is no problem and all that was asked for was measured, 4 otherwise.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.markup import escape

from baton.admin_client import DEFAULT_URL, AdminRefused, AdminUnreachable, admin_client
from baton.admin_tables import shown
from baton.doctor_checks import Finding, Verdict, examine, finding_table
from baton.doctor_cluster import LEGEND, PairVerdict, cluster_table, measure_cluster
from baton.doctor_pairs import MeasuredPair, measure_machine, measure_pairs, pair_table
from baton.pair_plan import Plan, host_and_port
from cluster.config import load_config, render_config
from cluster.errors import ConfigError, ServingError
from cluster.options import option, refused
from loadtest.metadata import collect_metadata

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_NOT_READY = 4
_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,2})?")


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
        if self.listen is not None and not _is_address(self.listen):
            raise refused("listen", "must be HOST:PORT")
        if self.to is not None and not (_is_address(self.to) and all(host_and_port(self.to))):
            raise refused("to", "must be HOST:PORT of another machine")
        if _DEVICE.fullmatch(self.device) is None:
            raise refused("device", "must be cpu, cuda or cuda:N")

    @property
    def is_json(self) -> bool:
        return self.output == "json"


def _is_address(text: str) -> bool:
    try:
        return bool(host_and_port(text))
    except ValueError:
        return False


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

    host, port = host_and_port(address)
    try:
        serve(Plan(device, device, None, host or "0.0.0.0", port))
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


def show(findings: Sequence[Finding], pairs: Sequence[MeasuredPair]) -> None:
    console = Console()
    console.print(finding_table(findings))
    if pairs:
        console.print()
        console.print(pair_table(pairs))
    console.print(f"\n{escape(conclusion(findings, pairs))}")


def conclusion(findings: Sequence[Finding], pairs: Sequence[MeasuredPair]) -> str:
    """The last line, which agrees with the exit code."""
    worst = [finding.subject for finding in findings if finding.verdict is Verdict.PROBLEM]
    if worst:
        return f"{', '.join(worst)}: mend this first."
    unmeasured = [pair.label for pair in pairs if not pair.rate]
    if unmeasured:
        return f"Baton can run here, but this was not measured: {', '.join(unmeasured)}."
    return "Baton can run here."
