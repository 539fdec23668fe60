"""Which processes a local cluster has, and with which settings each is started. Pure."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from baton.child import ChildSpec
from cluster.config import to_environment
from cluster.config_sources import CONFIG_VARIABLE
from cluster.errors import ConfigError
from cluster.options import option
from cluster.performance_mode import NODE_OPTIONS
from engine.config import EngineConfig
from gateway.config import GatewayConfig
from kv_transfer.config import KVTransferConfig

if TYPE_CHECKING:
    from cluster.config import LoadedConfig

POCKET_MODEL = Path(__file__).parent / "pocket_model"
POCKET_MODEL_NAME = "pocket"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """The local cluster itself."""

    model: Path = option(
        POCKET_MODEL,
        help="Folder of a Hugging Face checkpoint. Default: the small model that comes with Baton.",
        metavar="MODEL",
    )
    prefill: int = option(1, help="Number of prefill nodes.")
    decode: int = option(1, help="Number of decode nodes.")
    prefill_tensor_parallel_size: int | None = option(
        None, help="GPUs of each prefill node. Default: --tensor-parallel-size.", advanced=True
    )
    decode_tensor_parallel_size: int | None = option(
        None, help="GPUs of each decode node. Default: --tensor-parallel-size.", advanced=True
    )

    def __post_init__(self) -> None:
        for name in ("prefill", "decode"):
            if not 1 <= getattr(self, name) <= 64:
                raise ConfigError(f"--{name} must be between 1 and 64.", param=name)
            size = getattr(self, f"{name}_tensor_parallel_size")
            if size is not None and size < 1:
                raise ConfigError(f"--{name}-tensor-parallel-size must be at least 1.")


@dataclass(frozen=True, slots=True)
class PlacedNode:
    """One node: its name, its role and the device it runs on, the first of `num_ranks`."""

    name: str
    role: str
    device: str
    num_sharing: int  # nodes on the device that most of them share, itself included
    num_ranks: int = 1


def place_nodes(
    num_prefill: int,
    num_decode: int,
    device: str,
    num_gpus: int,
    *,
    prefill_ranks: int = 1,
    decode_ranks: int = 1,
) -> list[PlacedNode]:
    """Spread the nodes over the GPUs, prefill first. Without a GPU all are on the CPU.

    A node of several ranks takes neighbouring GPUs; what finds no room at the end of the row
    begins at its start again. Raises `ConfigError` when a node needs more GPUs than there are.
    """
    nodes = [(f"prefill-{i}", "prefill", prefill_ranks) for i in range(num_prefill)]
    nodes += [(f"decode-{i}", "decode", decode_ranks) for i in range(num_decode)]
    if device == "auto":
        device = "cuda" if num_gpus else "cpu"
    if device != "cuda":
        processes = sum(num_ranks for _, _, num_ranks in nodes)
        return [PlacedNode(name, role, device, processes, ranks) for name, role, ranks in nodes]
    count = max(1, num_gpus)
    begins, users, begin = [], [0] * count, 0
    for _, role, num_ranks in nodes:
        if num_ranks > count:
            raise ConfigError(
                f"A {role} node is to use {num_ranks} GPUs, but this machine has {num_gpus}.",
                param="tensor_parallel_size",
            )
        begin = begin if begin + num_ranks <= count else 0
        begins.append(begin)
        for gpu in range(begin, begin + num_ranks):
            users[gpu] += 1
        begin += num_ranks
    return [
        PlacedNode(name, role, f"cuda:{begin}", max(users[begin : begin + num_ranks]), num_ranks)
        for (name, role, num_ranks), begin in zip(nodes, begins, strict=True)
    ]


def node_engine_config(
    config: EngineConfig, node: PlacedNode, *, is_memory_explicit: bool, num_cores: int
) -> EngineConfig:
    """The engine's settings on one node: its device, and its share of what nodes have in common."""
    changes: dict[str, object] = {
        "device": node.device,
        "tensor_parallel_size": node.num_ranks,
    }
    if node.device.startswith("cuda") and not is_memory_explicit:
        changes["gpu_memory_utilization"] = config.gpu_memory_utilization / node.num_sharing
    if node.device == "cpu" and not config.num_threads:
        changes["num_threads"] = max(1, num_cores // node.num_sharing)
    return replace(config, **changes)  # type: ignore[arg-type]


def child_specs(
    loaded: LoadedConfig, *, redis_url: str, admin_token: str, log_format: str
) -> list[ChildSpec]:
    """Nodes first, gateway last: it is the first to be stopped."""
    serve, engine = loaded[ServeConfig], loaded[EngineConfig]
    ranks = engine.tensor_parallel_size
    nodes = place_nodes(
        serve.prefill,
        serve.decode,
        engine.device,
        count_gpus(),
        prefill_ranks=serve.prefill_tensor_parallel_size or ranks,
        decode_ranks=serve.decode_tensor_parallel_size or ranks,
    )
    own_to_nodes = unset_node_options(loaded)
    shared = {
        "BATON_REDIS_URL": redis_url,
        "BATON_LOG_LEVEL": loaded[GatewayConfig].log_level,
        "BATON_LOG_FORMAT": log_format,
        # Both are for programs that were started alone: a file would have options of others too.
        CONFIG_VARIABLE: "",
        "BATON_ADVERTISE_HOST": "",
    }
    specs = []
    for node in nodes:
        config = node_engine_config(
            engine,
            node,
            is_memory_explicit=loaded.is_explicit("gpu_memory_utilization"),
            num_cores=os.cpu_count() or 1,
        )
        arguments = [node.role, "--node-name", node.name, "--port", "0"]
        arguments += ["--host", "127.0.0.1", "--kv-port", "0", "--metrics-port", "0"]
        settings = to_environment(config, loaded[KVTransferConfig], leave_out=own_to_nodes)
        specs.append(ChildSpec(node.name, arguments, settings | shared))
    gateway = to_environment(serve_gateway_config(loaded[GatewayConfig]))
    token = {"BATON_ADMIN_TOKEN": admin_token}
    specs.append(ChildSpec("gateway", ["gateway"], gateway | shared | token))
    return specs


def unset_node_options(loaded: LoadedConfig) -> frozenset[str]:
    """Options that nodes take from the table of their own role, since nobody set them here."""
    return frozenset(name for name in NODE_OPTIONS if not loaded.is_explicit(name))


def serve_gateway_config(config: GatewayConfig) -> GatewayConfig:
    """The bundled model goes by a short name unless the operator gave it one."""
    if Path(config.model) == POCKET_MODEL and not config.served_model_name:
        return replace(config, served_model_name=(POCKET_MODEL_NAME,))
    return config


def count_gpus() -> int:
    """NVIDIA GPUs that this process may use, without loading torch; 0 when there is no driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip()])
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
    return sum(1 for line in listing.stdout.splitlines() if line.startswith("GPU "))
