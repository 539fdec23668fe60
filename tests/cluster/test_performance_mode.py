"""The tables of `--performance-mode`: what they set, what beats them, and where they are shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from cluster.config import LoadedConfig, load_config, render_config
from cluster.errors import UsageError
from cluster.options import options_of
from cluster.performance_mode import MODES, TABLES, device_kind, presets_of, render_tables
from engine.config import EngineConfig
from gateway.config import GatewayConfig
from kv_transfer.config import KVTransferConfig

README = Path(__file__).parents[2] / "README.md"
NODE_SECTIONS = (EngineConfig, KVTransferConfig)
SECTIONS = {"prefill": NODE_SECTIONS, "decode": NODE_SECTIONS, "gateway": (GatewayConfig,)}


def load(role: str, *argv: str, env: dict[str, str] | None = None) -> LoadedConfig:
    return load_config(
        f"baton {role}",
        SECTIONS[role],
        argv,
        env or {},
        positional="model",
        presets=presets_of(role),
    )


@pytest.mark.parametrize("role", TABLES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", ["GPU", "CPU"])
def test_each_row_sets_its_option_and_is_named_as_the_origin(
    role: str, mode: str, device: str
) -> None:
    flags = [] if role == "gateway" else ["--device", "cuda" if device == "GPU" else "cpu"]
    loaded = load(role, "m", "--performance-mode", mode, *flags)
    rows = [row for row in TABLES[role] if row.device in (None, device)]
    assert rows
    for row in rows:
        assert loaded.value(row.option) == getattr(row, mode)
        assert loaded.origins[row.option] == f"performance-mode {mode}, row {role} {row.name}"
        assert not loaded.is_explicit(row.option)


@pytest.mark.parametrize("role", TABLES)
def test_a_row_names_one_option_of_its_role_once_for_each_device(role: str) -> None:
    known = {o.name for section in SECTIONS[role] for o in options_of(section)}
    assert {row.option for row in TABLES[role]} <= known
    for device in ("GPU", "CPU"):
        names = [row.option for row in TABLES[role] if row.device in (None, device)]
        assert len(names) == len(set(names))


def test_what_is_given_beats_the_mode_and_the_rest_of_the_row_stays(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("num_staging_slots: 3\nperformance-mode: interactivity\n")
    argv = ("m", "--device", "cpu", "--max-num-seqs", "7", "--config", str(path))
    loaded = load("prefill", *argv, env={"BATON_MAX_CUDAGRAPH_CAPTURE_SIZE": "5"})
    shown = yaml.safe_load(render_config(loaded))
    assert shown["engine"]["max_num_seqs"] == 7
    assert shown["engine"]["max_cudagraph_capture_size"] == 5
    assert shown["kv_transfer"]["num_staging_slots"] == 3
    assert loaded.origins["performance_mode"] == f"file {path}"
    assert loaded.value("max_num_batched_tokens") == 256


def test_the_chosen_mode_follows_the_order_of_the_sources(tmp_path: Path) -> None:
    env = {"BATON_PERFORMANCE_MODE": "interactivity"}
    assert load("gateway", "m", env=env).value("stream_interval") == 1
    loaded = load("gateway", "m", "--performance-mode", "throughput", env=env)
    assert loaded.value("stream_interval") == 8


def test_an_unknown_mode_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError) as refused:
        load("decode", "m", "--performance-mode", "fast")
    assert "\n" not in refused.value.message
    assert "--performance-mode" in refused.value.message
    assert "'interactivity'" in refused.value.message


def test_a_node_is_taken_for_a_gpu_node_when_it_would_run_on_one() -> None:
    assert device_kind("cuda:1", {}) == "GPU"
    assert device_kind("cpu", {}) == "CPU"
    assert device_kind("auto", {"CUDA_VISIBLE_DEVICES": ""}) == "CPU"


def test_the_readme_shows_the_tables_as_they_are() -> None:
    text = README.read_text()
    begin, end = (f"<!-- performance modes: {word} -->\n" for word in ("begin", "end"))
    shown = text.partition(begin)[2].partition(end)[0].strip()
    assert shown == render_tables(), "python -m cluster.performance_mode prints the tables"


@pytest.mark.parametrize("role", TABLES)
def test_help_names_the_default_of_each_role(role: str) -> None:
    options = {each.name: each for section in SECTIONS[role] for each in options_of(section)}
    for row in TABLES[role]:
        each = options[row.option]
        assert each.default == row.balanced or re.search(rf"\b{row.balanced}\b", each.help), row
