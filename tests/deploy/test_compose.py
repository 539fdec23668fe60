from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from cluster.member_config import MemberConfig
from cluster.options import options_of
from engine.config import EngineConfig
from gateway.config import GatewayConfig
from kv_transfer.config import KVTransferConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

NODES = ("prefill", "decode", "prefill-gpu", "decode-gpu")
ADMIN_PORT = "8001"


@pytest.fixture(scope="module")
def compose_file(deploy: Path) -> Path:
    return deploy / "compose" / "compose.yaml"


@pytest.fixture(scope="module")
def services(compose_file: Path) -> dict[str, dict[str, Any]]:
    """With YAML merge keys resolved."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(compose_file.read_text())["services"]
    return found


def variables(value: Any) -> Iterator[str]:
    """Every `${NAME...}` in a document."""
    for match in re.finditer(r"\$\{(\w+)", yaml.safe_dump(value)):
        yield match[1]


def test_the_file_is_valid_by_the_compose_specification(compose_file: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, compose_file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_services_refer_to_exists(
    compose_file: Path, services: dict[str, dict[str, Any]]
) -> None:
    document = yaml.safe_load(compose_file.read_text())
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
        assert set(service.get("networks", ())) <= set(document["networks"])
        for mode in ("ipc", "pid"):
            kind, _, name = str(service.get(mode, "")).partition(":")
            assert kind != "service" or name in services


def test_mounted_and_built_paths_exist(
    compose_file: Path, services: dict[str, dict[str, Any]]
) -> None:
    for service in services.values():
        build = service.get("build")
        if build is not None:
            context = (compose_file.parent / build["context"]).resolve()
            assert (context / build["dockerfile"]).is_file()
        for volume in service.get("volumes", ()):
            source = re.sub(r"\$\{\w+:-(.+?)\}", r"\1", volume).split(":")[0]
            if source.startswith("."):
                assert (compose_file.parent / source).exists()


def test_build_arguments_are_arguments_of_the_dockerfile(
    compose_file: Path, services: dict[str, dict[str, Any]]
) -> None:
    for service in services.values():
        build = service.get("build", {})
        for name in build.get("args", ()):
            text = (compose_file.parent / build["context"] / build["dockerfile"]).read_text()
            assert re.search(rf"^ARG {name}=", text, re.MULTILINE)


def test_the_admin_api_is_published_nowhere(services: dict[str, dict[str, Any]]) -> None:
    for service in services.values():
        environment = service.get("environment", {})
        assert environment.get("BATON_ADMIN_HOST") is None
        assert not any(ADMIN_PORT in str(port) for port in service.get("ports", ()))
    gateway = GatewayConfig.__dataclass_fields__
    assert gateway["admin_host"].default == "127.0.0.1"


def test_ports_are_published_on_loopback_unless_told_otherwise(
    services: dict[str, dict[str, Any]],
) -> None:
    published = {name: s["ports"] for name, s in services.items() if s.get("ports")}
    assert set(published) == {"gateway", "grafana"}
    for port in (port for ports in published.values() for port in ports):
        assert port.startswith(("127.0.0.1:", "${BATON_BIND:-127.0.0.1}:"))


def test_nodes_are_on_the_internal_network_only(
    compose_file: Path, services: dict[str, dict[str, Any]]
) -> None:
    networks = yaml.safe_load(compose_file.read_text())["networks"]
    assert networks["cluster"]["internal"] is True
    for name in (*NODES, "redis"):
        assert set(services[name]["networks"]) == {"cluster"}


def test_secrets_must_be_set_and_are_never_written_here(
    compose_file: Path, services: dict[str, dict[str, Any]]
) -> None:
    text = compose_file.read_text()
    for name in ("BATON_API_KEY", "BATON_ADMIN_TOKEN", "REDIS_PASSWORD", "GRAFANA_ADMIN_PASSWORD"):
        uses = re.findall(rf"\$\{{{name}[^}}]*\}}", text)
        assert uses
        assert all(use == f"${{{name}:?set it in .env}}" for use in uses)
    for name in NODES:
        assert not {"BATON_API_KEY", "BATON_ADMIN_TOKEN"} & set(services[name]["environment"])


def test_every_variable_is_in_the_example_file_and_its_secrets_are_empty(
    compose_file: Path,
) -> None:
    example = compose_file.with_name(".env.example").read_text()
    shown = dict(re.findall(r"^#? ?([A-Z_]+)=(.*)$", example, re.MULTILINE))
    assert set(variables(yaml.safe_load(compose_file.read_text()))) == set(shown)
    required = re.findall(r"^([A-Z_]+)=(.*)$", example, re.MULTILINE)
    assert all(value == "" for _, value in required)


def test_every_setting_is_an_option_of_its_program(services: dict[str, dict[str, Any]]) -> None:
    def names(*sections: type) -> set[str]:
        return {each.variable for section in sections for each in options_of(section)}

    node = names(MemberConfig, EngineConfig, KVTransferConfig)
    programs: Mapping[str, set[str]] = dict.fromkeys(NODES, node)
    programs = {**programs, "gateway": names(GatewayConfig)}
    for program, known in programs.items():
        used = {n for n in services[program]["environment"] if n.startswith("BATON_")}
        assert used <= known


def test_long_running_services_are_checked_and_have_time_to_drain(
    services: dict[str, dict[str, Any]],
) -> None:
    for name in (*NODES, "gateway"):
        service = services[name]
        assert service["healthcheck"]["test"][0] == "CMD"
        grace = float(service["stop_grace_period"].removesuffix("s"))
        assert grace > float(service["environment"]["BATON_SHUTDOWN_TIMEOUT"])


def test_prometheus_scrapes_the_services_by_their_names(
    deploy: Path, services: dict[str, dict[str, Any]]
) -> None:
    config = yaml.safe_load((deploy / "prometheus" / "prometheus.yaml").read_text())
    targets = {
        target.split(":")[0]
        for job in config["scrape_configs"]
        for static in job["static_configs"]
        for target in static["targets"]
    }
    assert targets <= set(services)
    for role in ("prefill", "decode"):
        assert role in services[f"{role}-gpu"]["networks"]["cluster"]["aliases"]
