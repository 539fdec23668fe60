"""`baton serve [MODEL]`: a gateway, the two pools and Redis on this machine, one command.

    1. Read one configuration for all; whatever is wrong in it is said before a process starts.
    2. Start a private Redis unless `--redis-url` names one; it is started again when it dies.
    3. Start the nodes and the gateway as processes of their own; show their phases.
    4. Say where to send requests. Then wait: for Ctrl-C, or SIGTERM.
    5. Drain and end them all; no process stays behind.

Values travel to the children as `BATON_*` variables, so no secret is ever in an argument list.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
from contextlib import ExitStack, suppress
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import redis
from rich.console import Console

from baton.embedded_redis import EmbeddedRedis
from baton.local_cluster import ServeConfig, child_specs, unset_node_options
from baton.progress import StartupView
from baton.supervisor import Supervisor
from cluster.config import load_config, render_config
from cluster.errors import ConfigError
from cluster.logging import redact
from cluster.model_folder import check_model_folder
from cluster.performance_mode import device_kind, node_choices, presets_of
from engine.config import EngineConfig
from gateway.admin.token_file import left_admin_token
from gateway.config import GatewayConfig
from kv_transfer.config import KVTransferConfig

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from baton.child import Facts
    from cluster.config import LoadedConfig

EXIT_NOT_READY = 4
EXIT_GRACE_SECONDS = 5.0
MEETING_SECONDS = 20.0
POLL_SECONDS = 0.05
REDIS_SECONDS = 3.0
SECTIONS = (ServeConfig, GatewayConfig, EngineConfig, KVTransferConfig)


def main(argv: Sequence[str]) -> int:
    loaded = load_config(
        "baton serve",
        SECTIONS,
        argv,
        os.environ,
        positional="model",
        presets=presets_of("gateway"),
        description="Serve a model on this machine: gateway, prefill and decode nodes, Redis.",
    )
    if loaded.show_config:
        print(render_config(loaded, left_to_nodes(loaded)), end="")
        return 0
    check_model_folder(loaded[ServeConfig].model)
    return asyncio.run(serve(loaded))


def left_to_nodes(loaded: LoadedConfig) -> dict[str, tuple[str, str]]:
    """What each node will choose by its role, in words."""
    engine = loaded[EngineConfig]
    choices = node_choices(engine.performance_mode, device_kind(engine.device))
    return {name: choices[name] for name in unset_node_options(loaded) if name in choices}


async def serve(loaded: LoadedConfig) -> int:
    """Run the cluster until told to stop; the exit code."""
    stop = asyncio.Event()
    console = Console(stderr=True)
    view = StartupView(console)
    with ExitStack() as stack:
        private_redis = start_redis(loaded, stack)
        specs = child_specs(
            loaded,
            redis_url=private_redis.url if private_redis else loaded[GatewayConfig].redis_url,
            admin_token=loaded[GatewayConfig].admin_token or secrets.token_urlsafe(24),
            log_format="console" if console.is_terminal else "json",
        )
        supervisor = Supervisor(
            specs,
            on_fact=view.take_fact,
            on_line=view.take_line,
            shutdown_timeout_seconds=loaded[GatewayConfig].shutdown_timeout + EXIT_GRACE_SECONDS,
        )
        install_stop_signals(asyncio.get_running_loop(), stop, supervisor)
        keeping = asyncio.create_task(keep_alive(private_redis, console))
        try:
            with view:
                started = await done_unless_stopped(bring_up(supervisor), stop)
            if started:
                if not loaded[GatewayConfig].admin_token:
                    token = specs[-1].environment["BATON_ADMIN_TOKEN"]
                    port = urlsplit(gateway_facts(supervisor)["admin_url"]).port or 0
                    leave_token(token, loaded[GatewayConfig].admin_host, port, stack, console)
                announce(supervisor, loaded)
                await stop.wait()
                console.print("Draining; Ctrl-C again ends at once.")
        except ConfigError as error:
            console.print(
                f"baton serve: {error.message}", style="red", markup=False, soft_wrap=True
            )
            return EXIT_NOT_READY
        finally:
            await supervisor.stop()
            keeping.cancel()
    console.print("Stopped.")
    return 0


def leave_token(token: str, host: str, port: int, stack: ExitStack, console: Console) -> None:
    """One that was drawn, where `baton admin` finds it as long as `stack` lives; else say it. One
    that was given is written nowhere."""
    try:
        stack.enter_context(left_admin_token(host, port, token))
    except ConfigError as error:
        told = f"baton serve: {error.message} For this run pass --admin-token {token}"
        console.print(told, style="yellow", markup=False, soft_wrap=True)


def start_redis(loaded: LoadedConfig, stack: ExitStack) -> EmbeddedRedis | None:
    """A private one that lives as long as `stack`; None when the operator's is used."""
    if loaded.is_explicit("redis_url"):
        check_redis_answers(loaded[GatewayConfig].redis_url)
        return None
    return stack.enter_context(EmbeddedRedis())


async def keep_alive(server: EmbeddedRedis | None, console: Console) -> None:
    """Start the private Redis again whenever it has died, until cancelled."""
    while server is not None:
        await asyncio.sleep(POLL_SECONDS)
        if server.is_running:
            continue
        console.print("redis: died; it is started again", markup=False)
        try:
            await asyncio.to_thread(server.revive)
        except ConfigError as error:
            console.print(f"redis: {error.message}", style="red", markup=False, soft_wrap=True)
            await asyncio.sleep(REDIS_SECONDS)


def check_redis_answers(url: str) -> None:
    """Raise `ConfigError` now: without its registry the cluster would wait for itself."""
    try:
        with contextlib.closing(
            redis.Redis.from_url(
                url, socket_timeout=REDIS_SECONDS, socket_connect_timeout=REDIS_SECONDS
            )
        ) as client:
            client.ping()
    except (redis.RedisError, OSError) as error:
        raise ConfigError(
            f"Redis does not answer at {redact(url)}: {str(error).rstrip('.')}. "
            "Without --redis-url a private one is started."
        ) from error


async def bring_up(supervisor: Supervisor) -> None:
    """Start all, and wait until the gateway sees a pair of nodes. Raises `ConfigError`."""
    await supervisor.start()
    url = f"{gateway_facts(supervisor)['url']}/readyz"
    try:
        async with asyncio.timeout(MEETING_SECONDS), aiohttp.ClientSession() as session:
            while True:
                with suppress(aiohttp.ClientError):  # it may be on its way up again
                    async with session.get(url) as response:
                        if response.status == HTTPStatus.OK:
                            return
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise ConfigError(
            "The gateway does not see the nodes. Is Redis reachable from this machine?"
        ) from None


def gateway_facts(supervisor: Supervisor) -> Facts:
    return next(child.ready_facts for child in supervisor.children if child.spec.name == "gateway")


async def done_unless_stopped(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> bool:
    """True once `work` is done; False when the person gave up waiting. Raises what it raises."""
    working = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not working.done():
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        return False
    await working
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
    facts = gateway_facts(supervisor)
    url, model = facts["url"], facts["model"]
    has_key = bool(loaded[GatewayConfig].api_key)
    header = "  -H 'Authorization: Bearer YOUR_KEY' \\\n" if has_key else ""
    key = " --api-key YOUR_KEY" if has_key else ""
    token = " --admin-token YOUR_TOKEN" if loaded[GatewayConfig].admin_token else ""
    baton = sys.argv[0] if Path(sys.argv[0]).name == "baton" else "baton"
    print(
        f"\nBaton serves {model} at {url}/v1  (admin: {facts['admin_url']})\n\n"
        f"Ask it something, from another terminal:\n\n"
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n{header}"
        f'  -d \'{{"model": "{model}", "stream": true, '
        f'"messages": [{{"role": "user", "content": "What is Python?"}}]}}\'\n\n'
        f"{baton} admin nodes --admin-url {facts['admin_url']}{token}   shows its nodes\n"
        f"{baton} bench run --base-url {url} --num-prompts 50{key}   measures it\n"
        "Ctrl-C drains and stops it.",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
