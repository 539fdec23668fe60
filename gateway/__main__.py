"""`baton gateway MODEL`, also `python -m gateway`: the HTTP edge of a cluster."""

from __future__ import annotations

import os
import sys
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from cluster.config import load_config, render_config
from cluster.errors import ConfigError
from cluster.logging import setup_logging
from cluster.performance_mode import presets_of
from cluster.startup import StartupReport
from gateway.config import GatewayConfig

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """The exit code; raises `ConfigError` for what the command line reports."""
    loaded = load_config(
        "baton gateway",
        [GatewayConfig],
        argv,
        os.environ,
        positional="model",
        presets=presets_of("gateway"),
        description="The HTTP edge of a cluster: OpenAI-compatible API, routing, admin API.",
    )
    if loaded.show_config:
        print(render_config(loaded), end="")
        return 0
    config = loaded[GatewayConfig]
    setup_logging(config.log_level, log_format=config.log_format, role="gateway")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # a peer that leaves is our news, not its
    report = StartupReport()
    try:
        # Late, so that help and --show-config answer at once.
        resolve_name("gateway.server:serve")(config, report)
    except ConfigError as error:
        report.failed(error.message)
        raise
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        print(f"baton gateway: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)
