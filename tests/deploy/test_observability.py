"""Rules and dashboard may only speak of metrics and labels that the product exports."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from cluster.metrics import StoreMetrics, new_registry
from cluster.node import (
    Incarnation,
    NodeId,
    NodeInfo,
    NodeLoad,
    NodeName,
    NodeRole,
    NodeState,
)
from engine.block_manager import BlockManager
from engine.loop_parts import LoopStats
from engine.metrics import EngineCollector
from gateway.measures import Measures
from gateway.metrics import GatewayCollector
from kv_transfer.metrics import TransferCollector
from kv_transfer.stats import TransferStats

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prometheus_client import CollectorRegistry, Metric

SCRAPE_LABELS = {"job", "instance"}
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
JOBS = {"baton-gateway", "baton-prefill", "baton-decode"}


class OneNode:
    """A gateway's view of a cluster: a node that exchanges KV, so that every family shows."""

    def __iter__(self) -> Iterator[Any]:
        info = NodeInfo(
            id=NodeId(NodeName("decode-0"), Incarnation(1)),
            role=NodeRole.DECODE,
            state=NodeState.READY,
            grpc_address="",
            metrics_address="",
            model_name="m",
            compatibility_hash="",
            block_size=16,
            max_model_len=1,
            transports=("tcp",),
        )
        yield SimpleNamespace(info=info, client=SimpleNamespace(is_connected=True))

    def decode_load(self) -> NodeLoad:
        return NodeLoad()


@dataclass(frozen=True)
class Exported:
    """Series by name, each with its labels. Counts by label are filled, so labels show."""

    series: dict[str, set[str]]

    @classmethod
    def collect(cls) -> Exported:
        registry: CollectorRegistry = new_registry(role="gateway", version="0")
        store = StoreMetrics(registry)
        store.calls.labels("registry", "ok").inc()
        store.poisoned.labels("registry").inc()
        store.is_up.labels("registry").set(1)
        families: list[Metric] = list(registry.collect())
        nodes: Any = OneNode()
        families += GatewayCollector(Measures(), nodes, "m", lambda: 0, lambda: 0).collect()
        families += EngineCollector(NodeLoad, LoopStats(), manager=BlockManager(1, 8)).collect()
        stats = TransferStats()
        families += TransferCollector(stats, transports=tuple).collect()
        series = {}
        for family in families:
            for suffix in SUFFIXES.get(family.type, ("",)):
                labels = set(getattr(family, "_labelnames", ()))
                labels |= {name for sample in family.samples for name in sample.labels}
                series[family.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
        series["up"] = set()
        return cls(series)


@pytest.fixture(scope="module")
def exported() -> Exported:
    return Exported.collect()


@pytest.fixture(scope="module")
def rules(deploy: Path) -> list[dict[str, Any]]:
    document = yaml.safe_load((deploy / "prometheus" / "rules.yaml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def dashboard(deploy: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((deploy / "grafana" / "baton-overview.json").read_text())
    return document


@pytest.fixture(scope="module")
def expressions(rules: list[dict[str, Any]], dashboard: dict[str, Any]) -> list[str]:
    asked = [target["expr"] for p in dashboard["panels"] for target in p.get("targets", ())]
    return [rule["expr"] for rule in rules] + asked


def names_in(expression: str) -> set[str]:
    without_text = re.sub(r'"[^"]*"', "", expression)
    return set(re.findall(r"\b(?:baton_\w+|up\b)", without_text))


def test_every_metric_that_is_asked_for_exists(expressions: list[str], exported: Exported) -> None:
    asked = set().union(*map(names_in, expressions))
    assert asked - set(exported.series) == set()
    assert len(asked) > 30  # the expressions were really read


def test_every_label_that_is_selected_exists_on_its_metric(
    expressions: list[str], exported: Exported
) -> None:
    for expression in expressions:
        for name, selector in re.findall(r"\b(baton_\w+|up)\{([^}]*)\}", expression):
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert labels <= exported.series[name] | SCRAPE_LABELS, expression


def test_every_label_that_is_grouped_by_exists_on_a_metric_of_the_expression(
    expressions: list[str], exported: Exported
) -> None:
    for expression in expressions:
        known = SCRAPE_LABELS.union(*(exported.series[n] for n in names_in(expression)))
        for group in re.findall(r"\bby \(([^)]*)\)", expression):
            assert {label.strip() for label in group.split(",")} <= known, expression


def test_legends_use_labels_that_are_left_after_grouping(dashboard: dict[str, Any]) -> None:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            groups = re.findall(r"\bby \(([^)]*)\)", target["expr"])
            if groups:
                kept = {label.strip() for label in groups[0].split(",")}
                assert shown <= kept, panel["title"]


def test_a_share_of_failures_is_there_when_nothing_has_failed(dashboard: dict[str, Any]) -> None:
    """Prometheus has no series of what has not happened, and 0/0 is no number."""
    shares = [
        target["expr"]
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
        if panel["type"] == "stat" and " / " in target["expr"]
    ]
    assert len(shares) == 2
    for expression in shares:
        part, _, whole = expression.partition(" / ")
        assert whole.endswith("> 0)"), expression
        assert "{" not in part or "or vector(0)" in part, expression


def test_brackets_and_quotes_of_expressions_close(expressions: list[str]) -> None:
    for expression in expressions:
        assert expression.count('"') % 2 == 0
        depth = []
        for char in re.sub(r'"[^"]*"', "", expression):
            if char in "([{":
                depth.append({"(": ")", "[": "]", "{": "}"}[char])
            elif char in ")]}":
                assert depth.pop() == char, expression
        assert not depth, expression


def test_job_names_are_those_that_are_scraped(deploy: Path, expressions: list[str]) -> None:
    config = yaml.safe_load((deploy / "prometheus" / "prometheus.yaml").read_text())
    assert {job["job_name"] for job in config["scrape_configs"]} == JOBS
    assert config["rule_files"] == ["rules.yaml"]
    used = {job for e in expressions for job in re.findall(r'job="([^"]+)"', e)}
    assert used <= JOBS


def test_every_alert_is_whole_and_has_a_runbook(deploy: Path, rules: list[dict[str, Any]]) -> None:
    headings = re.findall(r"^### (\w+)$", (deploy / "README.md").read_text(), re.MULTILINE)
    anchors = {heading.lower() for heading in headings}
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))
        assert rule["annotations"]["summary"].endswith(".")
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert page == "deploy/README.md"
        assert anchor in anchors
    named = {rule["annotations"]["runbook_url"].partition("#")[2] for rule in rules}
    assert anchors == named  # no runbook for an alert that is gone


def test_every_alert_is_tested_both_ways(deploy: Path, rules: list[dict[str, Any]]) -> None:
    tests = yaml.safe_load((deploy / "prometheus" / "rules.test.yaml").read_text())["tests"]
    alerts = {rule["alert"] for rule in rules}
    firing, quiet = (
        {case["alertname"]: case["exp_alerts"] for case in test["alert_rule_test"]}
        for test in tests
    )
    assert set(firing) == set(quiet) == alerts
    assert all(firing.values())
    assert not any(quiet.values())


def test_panels_have_ids_of_their_own_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_dashboard_finds_the_data_source_that_is_provisioned(
    deploy: Path, dashboard: dict[str, Any]
) -> None:
    folder = deploy / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    (variable,) = dashboard["templating"]["list"]
    assert (variable["type"], variable["query"]) == ("datasource", source["type"])
    (provider,) = yaml.safe_load((folder / "dashboards" / "baton.yaml").read_text())["providers"]
    compose = (deploy / "compose" / "compose.yaml").read_text()
    assert f"{provider['options']['path']}/baton-overview.json" in compose
