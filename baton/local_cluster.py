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
from cluster.errors import ConfigError
from cluster.options import option
from cluster.performance_mode import differing_by_role
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

    def __post_init__(self) -> None:
        for name in ("prefill", "decode"):
            if not 1 <= getattr(self, name) <= 64:
                raise ConfigError(f"--{name} must be between 1 and 64.", param=name)


@dataclass(frozen=True, slots=True)
class Placement:
    """One node process: its name, its role and the device it runs on."""

    name: str
    role: str
    device: str
    num_sharing: int  # nodes on that device, itself included


def place_nodes(num_prefill: int, num_decode: int, device: str, num_gpus: int) -> list[Placement]:
    """Spread the nodes over the GPUs, prefill first. Without a GPU all are on the CPU."""
    names = [(f"prefill-{i}", "prefill") for i in range(num_prefill)]
    names += [(f"decode-{i}", "decode") for i in range(num_decode)]
    if device == "auto":
        device = "cuda" if num_gpus else "cpu"
    if device != "cuda":
        return [Placement(name, role, device, len(names)) for name, role in names]
    count = max(1, num_gpus)
    per_gpu = [sum(1 for i in range(len(names)) if i % count == gpu) for gpu in range(count)]
    return [
        Placement(name, role, f"cuda:{i % count}", per_gpu[i % count])
        for i, (name, role) in enumerate(names)
    ]


def node_engine_config(
    config: EngineConfig, placement: Placement, *, is_memory_explicit: bool, num_cores: int
) -> EngineConfig:
    """The engine's settings on one node: its device, and its share of what nodes have in common."""
    changes: dict[str, object] = {"device": placement.device}
    if placement.device.startswith("cuda") and not is_memory_explicit:
        changes["gpu_memory_utilization"] = config.gpu_memory_utilization / placement.num_sharing
    if placement.device == "cpu" and not config.num_threads:
        changes["num_threads"] = max(1, num_cores // placement.num_sharing)
    return replace(config, **changes)  # type: ignore[arg-type]


def child_specs(
    loaded: LoadedConfig, *, redis_url: str, admin_token: str, log_format: str
) -> list[ChildSpec]:
    """Nodes first, gateway last: it is the first to be stopped."""
    serve, engine = loaded[ServeConfig], loaded[EngineConfig]
    placements = place_nodes(serve.prefill, serve.decode, engine.device, count_gpus())
    own_to_nodes = unset_node_options(loaded)
    shared = {
        "BATON_REDIS_URL": redis_url,
        "BATON_LOG_LEVEL": loaded[GatewayConfig].log_level,
        "BATON_LOG_FORMAT": log_format,
    }
    specs = []
    for placement in placements:
        config = node_engine_config(
            engine,
            placement,
            is_memory_explicit=loaded.is_explicit("gpu_memory_utilization"),
            num_cores=os.cpu_count() or 1,
        )
        arguments = [placement.role, "--node-name", placement.name, "--port", "0"]
        arguments += ["--host", "127.0.0.1", "--kv-port", "0", "--metrics-port", "0"]
        settings = to_environment(config, loaded[KVTransferConfig], leave_out=own_to_nodes)
        specs.append(ChildSpec(placement.name, arguments, settings | shared))
    gateway = to_environment(serve_gateway_config(loaded[GatewayConfig]))
    token = {"BATON_ADMIN_TOKEN": admin_token}
    specs.append(ChildSpec("gateway", ["gateway"], gateway | shared | token))
    return specs


def unset_node_options(loaded: LoadedConfig) -> frozenset[str]:
    """Options that nodes take from the table of their own role, since nobody set them here."""
    return frozenset(name for name in differing_by_role() if not loaded.is_explicit(name))


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
