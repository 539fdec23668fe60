"""`baton serve [MODEL]`: a gateway, the two pools and Redis on this machine, one command.

    1. Read one configuration for all; whatever is wrong in it is said before a process starts.
    2. Start a private Redis unless `--redis-url` names one.
    3. Start the nodes and the gateway as processes of their own; show their phases.
    4. Say where to send requests. Then wait: for Ctrl-C, or SIGTERM.
    5. Drain and end them all; no process stays behind.

Values travel to the children as `BATON_*` variables, so no secret is ever in an argument list.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from rich.console import Console

from baton.embedded_redis import EmbeddedRedis
from baton.local_cluster import ServeConfig, child_specs
from baton.progress import StartupView
from baton.supervisor import Supervisor
from cluster.config import load_config, render_config
from cluster.errors import ConfigError
from engine.config import EngineConfig
from gateway.config import GatewayConfig
from kv_transfer.config import KVTransferConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.config import LoadedConfig

EXIT_NOT_READY = 4
EXIT_INTERRUPTED = 130
SECTIONS = (ServeConfig, GatewayConfig, EngineConfig, KVTransferConfig)


def main(argv: Sequence[str]) -> int:
    loaded = load_config(
        "baton serve",
        SECTIONS,
        argv,
        os.environ,
        positional="model",
        description="Serve a model on this machine: gateway, prefill and decode nodes, Redis.",
    )
    if loaded.show_config:
        print(render_config(loaded), end="")
        return 0
    return asyncio.run(serve(loaded))


async def serve(loaded: LoadedConfig) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    console = Console(stderr=True)
    with ExitStack() as stack:
        redis_url = loaded[GatewayConfig].redis_url
        if not redis_url:
            redis_url = stack.enter_context(EmbeddedRedis()).url
        view = StartupView(console)
        supervisor = Supervisor(
            child_specs(loaded, redis_url),
            on_fact=view.take_fact,
            on_line=view.take_line,
            shutdown_timeout_seconds=loaded[GatewayConfig].shutdown_timeout + 5.0,
        )
        install_stop_signals(loop, stop, supervisor)
        try:
            with view:
                started = await start_unless_stopped(supervisor, stop)
            if started:
                announce(supervisor, loaded)
                await stop.wait()
                console.print("Draining; Ctrl-C again ends at once.")
        except ConfigError as error:
            console.print(f"baton serve: {error.message}", style="red", markup=False)
            return EXIT_NOT_READY
        finally:
            await supervisor.stop()
    console.print("Stopped.")
    return 0


async def start_unless_stopped(supervisor: Supervisor, stop: asyncio.Event) -> bool:
    """True once all are ready; False when the person gave up waiting. Raises `StartFailed`."""
    starting = asyncio.create_task(supervisor.start())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not starting.done():
        starting.cancel()
        return False
    await starting
    return True


def install_stop_signals(
    loop: asyncio.AbstractEventLoop, stop: asyncio.Event, supervisor: Supervisor
) -> None:
    """The first signal drains; the second kills what still runs."""

    def handle() -> None:
        if stop.is_set():
            supervisor.kill()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handle)


def announce(supervisor: Supervisor, loaded: LoadedConfig) -> None:
    """Where requests go, and one that works when pasted."""
    facts = next(child.ready_facts for child in supervisor.children if child.spec.name == "gateway")
    url, model = facts["url"], facts["model"]
    header = "  -H 'Authorization: Bearer YOUR_KEY' \\\n" if loaded[GatewayConfig].api_key else ""
    print(
        f"\nBaton serves {model} at {url}/v1  (admin: {facts['admin_url']})\n\n"
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n{header}"
        f'  -d \'{{"model": "{model}", "stream": true, '
        f'"messages": [{{"role": "user", "content": "What is Python?"}}]}}\'\n\n'
        "Ctrl-C stops it.",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
