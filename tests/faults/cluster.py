"""A cluster for faults: the programs that `baton serve` starts, each behind proxies of ours.

Life of a cluster
    1. redis-server on a port of its own; all others reach it through `redis_proxy`.
    2. The nodes listen at 127.0.0.1 and advertise 127.0.0.2, where a proxy for each stands at the
       same port: gateways and prefill nodes reach them through it (`node_proxies`). A node that is
       started again has its old address.
    3. The supervisor of `baton serve` keeps them running; gateways keep their ports too.
    4. Nodes run as `tests.faults.faulty_node`, which can spoil the KV that leaves them.

`stop` heals everything first, so that nothing is left standing still.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from baton.child import ChildState
from baton.local_cluster import child_specs
from baton.serve import SECTIONS
from baton.supervisor import Supervisor
from cluster.config import load_config
from cluster.performance_mode import presets_of
from tests.e2e.cluster_process import ADMIN_TOKEN, ClusterFace, eventually
from tests.faults.nemesis import is_gone
from tests.faults.ports import HERE, PROXIED, free_port
from tests.faults.proxy_thread import LoopThread, Proxies
from tests.faults.redis_server import RedisServer

if TYPE_CHECKING:
    import sys  # noqa: F401
    from collections.abc import Mapping
    from pathlib import Path

    from baton.child import Child, ChildSpec, Facts
    from tests.faults.asks import Ask
    from tests.faults.proxy import FaultProxy

STARTS_WITHIN_SECONDS = 120.0
PAUSE_SECONDS = 0.1
DRAIN_SECONDS = 5.0


class FaultCluster(ClusterFace):
    """`options` are those of `baton serve`; `env` and `node_env` (by name) are added to all
    programs and to one. `lines` is what they said, each after the name of its program."""

    def __init__(
        self,
        *options: str,
        seed: int = 1,
        num_gateways: int = 1,
        env: Mapping[str, str] | None = None,
        node_env: Mapping[str, Mapping[str, str]] | None = None,
        kv_orders: Path | None = None,
    ) -> None:
        self.lines: list[str] = []
        self.seed = seed
        self.redis = RedisServer()
        self.proxies = Proxies(seed=seed)
        self.redis_proxy = self.proxies.open(HERE, self.redis.port)
        self.node_proxies: dict[str, FaultProxy] = {}
        self._thread = LoopThread("supervisor")
        specs = self._specs(options, num_gateways, kv_orders)
        for number, spec in enumerate(specs):
            added = {**(env or {}), **(node_env or {}).get(spec.name, {})}
            specs[number] = replace(spec, environment={**spec.environment, **added})
        self._supervisor = self._thread.run(_made(specs, self._take_line))
        try:
            self._thread.run(self._supervisor.start())
            eventually(self.is_whole, STARTS_WITHIN_SECONDS)
        except BaseException:
            print("\n".join(self.lines))
            self.stop()
            raise

    # ---- who is there -------------------------------------------------------------------

    def child(self, name: str) -> int:
        """The pid of the program `name` as it runs now: a node, "gateway", or "redis"."""
        pid = self.pid_of(name)
        if pid is None:
            raise LookupError(name)
        return pid

    def pid_of(self, name: str) -> int | None:
        """The same; None while it is being started again."""
        return self.redis.pid if name == "redis" else self._child(name).pid

    def pids(self) -> dict[str, int]:
        """Of all programs."""
        return {name: self.child(name) for name in [*self.names, "redis"]}

    def is_ready(self, name: str) -> bool:
        """The program runs and has said that it serves."""
        child = self._child(name)
        return child.state is ChildState.READY and not is_gone(child.pid or 0)

    def url_of(self, ask: Ask) -> str:
        """The gateway of one request: they take turns."""
        return self.urls[ask.number % len(self.urls)]

    def metrics_address(self, name: str) -> str:
        if name in self.gateway_ports:
            return f"{HERE}:{self.gateway_ports[name]}"
        return f"{HERE}:{self.node_metrics_ports[name]}"

    def is_whole(self) -> bool:
        """All programs serve, and the gateway is connected with every node."""
        if not all(self.is_ready(name) for name in self.names):
            return False
        try:
            nodes = self.nodes()
        except OSError:
            return False
        return len(nodes) == len(self.node_names) and all(
            node["state"] == "ready" and node["is_connected"] for node in nodes.values()
        )

    # ---- its end -------------------------------------------------------------------------

    def stop(self) -> None:
        self.proxies.heal()
        self._thread.run(self._supervisor.stop())
        self._thread.close()
        self.proxies.close()
        self.redis.stop()

    # ---- how it is made --------------------------------------------------------------------

    def _child(self, name: str) -> Child:
        return next(child for child in self._supervisor.children if child.spec.name == name)

    def _take_line(self, child: Child, line: str) -> None:
        self.lines.append(f"{child.spec.name}: {line}")

    def _specs(
        self, options: tuple[str, ...], num_gateways: int, kv_orders: Path | None
    ) -> list[ChildSpec]:
        loaded = load_config(
            "a cluster for faults",
            SECTIONS,
            ["--port", "0", "--admin-port", "0", *options],
            {},
            positional="model",
            presets=presets_of("gateway"),
        )
        redis_url = f"redis://{HERE}:{self.redis_proxy.port}/0"
        *nodes, gateway = child_specs(
            loaded, redis_url=redis_url, admin_token=ADMIN_TOKEN, log_format="json"
        )
        self.node_names = [node.name for node in nodes]
        self.node_metrics_ports = {name: free_port() for name in self.node_names}
        self.gateway_ports = {
            "gateway" if number == 0 else f"gateway-{number}": free_port()
            for number in range(num_gateways)
        }
        self.names = [*self.node_names, *self.gateway_ports]
        self.urls = [f"http://{HERE}:{port}/v1" for port in self.gateway_ports.values()]
        gateways = [_gateway(gateway, name, port) for name, port in self.gateway_ports.items()]
        self.base_url = f"http://{HERE}:{self.gateway_ports['gateway']}"
        self.admin_url = f"http://{HERE}:{gateways[0].environment['BATON_ADMIN_PORT']}"
        return [*(self._node(node, kv_orders) for node in nodes), *gateways]

    def _node(self, spec: ChildSpec, kv_orders: Path | None) -> ChildSpec:
        """Its own port, and a proxy before it."""
        port = free_port()
        self.node_proxies[spec.name] = self.proxies.open(HERE, port, listen=(PROXIED, port))
        role, *_ = spec.arguments
        arguments = [role, "--node-name", spec.name, "--host", HERE, "--port", str(port)]
        arguments += ["--advertise-host", PROXIED, "--kv-port", "0"]
        environment = {
            **spec.environment,
            "BATON_METRICS_PORT": str(self.node_metrics_ports[spec.name]),
        }
        if kv_orders is not None:
            environment["BATON_TEST_KV_ORDERS"] = str(kv_orders / spec.name)
        interpreter, *_ = spec.program
        return replace(
            spec,
            program=(interpreter, "-m", "tests.faults.faulty_node"),
            arguments=arguments,
            environment=environment,
        )


def _gateway(spec: ChildSpec, name: str, port: int) -> ChildSpec:
    ports = {"BATON_PORT": str(port), "BATON_ADMIN_PORT": str(free_port())}
    return replace(spec, name=name, environment={**spec.environment, **ports})


async def _made(specs: list[ChildSpec], on_line: object) -> Supervisor:
    """On the loop that it will run on."""

    def on_fact(child: Child, fact: Facts) -> None:
        if fact["event"] in ("ready", "died", "failed"):
            on_line(child, str(fact))  # type: ignore[operator]

    return Supervisor(
        specs,
        on_fact=on_fact,
        on_line=on_line,  # type: ignore[arg-type]
        shutdown_timeout_seconds=DRAIN_SECONDS,
        first_pause_seconds=PAUSE_SECONDS,
    )
