"""Where the nodes of a local cluster run, and what each of them is given."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from baton.local_cluster import child_specs, node_engine_config, place_nodes
from baton.serve import SECTIONS, left_to_nodes
from cluster.config import LoadedConfig, load_config, render_config
from cluster.errors import ConfigError
from cluster.member_config import MemberConfig
from cluster.performance_mode import presets_of
from engine.config import EngineConfig
from kv_transfer.config import KVTransferConfig


def test_without_a_gpu_all_nodes_share_the_processor() -> None:
    placements = place_nodes(1, 1, "auto", 0)
    assert [(p.name, p.device, p.num_sharing) for p in placements] == [
        ("prefill-0", "cpu", 2),
        ("decode-0", "cpu", 2),
    ]


def test_each_node_gets_a_gpu_of_its_own_when_there_are_enough() -> None:
    placements = place_nodes(1, 1, "auto", 2)
    assert [p.device for p in placements] == ["cuda:0", "cuda:1"]
    assert all(p.num_sharing == 1 for p in placements)


def test_more_nodes_than_gpus_share_evenly() -> None:
    placements = place_nodes(1, 2, "auto", 2)
    assert [(p.device, p.num_sharing) for p in placements] == [
        ("cuda:0", 2),
        ("cuda:1", 1),
        ("cuda:0", 2),
    ]


def test_a_gpu_that_is_asked_for_is_used_by_all() -> None:
    assert {p.device for p in place_nodes(1, 1, "cuda:1", 2)} == {"cuda:1"}


def test_ranks_of_a_node_take_neighbouring_gpus() -> None:
    placements = place_nodes(2, 1, "auto", 4, decode_ranks=2)
    assert [(p.device, p.num_ranks, p.num_sharing) for p in placements] == [
        ("cuda:0", 1, 1),
        ("cuda:1", 1, 1),
        ("cuda:2", 2, 1),
    ]


def test_nodes_of_several_ranks_share_gpus_where_there_are_too_few() -> None:
    placements = place_nodes(1, 2, "auto", 3, prefill_ranks=2, decode_ranks=2)
    assert [(p.device, p.num_sharing) for p in placements] == [
        ("cuda:0", 3),
        ("cuda:0", 3),
        ("cuda:0", 3),
    ]


def test_a_node_that_needs_more_gpus_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="decode node is to use 4 GPUs, but this machine has 2"):
        place_nodes(1, 1, "auto", 2, decode_ranks=4)


def test_the_pools_of_a_local_cluster_can_have_other_numbers_of_ranks() -> None:
    loaded = load_serve("-tp", "2", "--decode-tensor-parallel-size", "4", "--device", "cpu")
    specs = child_specs(loaded, redis_url="redis://x", admin_token="t", log_format="json")
    ranks = {spec.name: spec.environment.get("BATON_TENSOR_PARALLEL_SIZE") for spec in specs}
    assert ranks == {"prefill-0": "2", "decode-0": "4", "gateway": None}


@pytest.mark.parametrize(("is_explicit", "expected"), [(False, 0.45), (True, 0.9)])
def test_nodes_on_one_gpu_share_its_memory_unless_told_otherwise(
    is_explicit: bool, expected: float
) -> None:
    placement = place_nodes(1, 1, "auto", 1)[0]
    config = EngineConfig(model=Path("m"))
    given = node_engine_config(config, placement, is_memory_explicit=is_explicit, num_cores=2)
    assert given.gpu_memory_utilization == pytest.approx(expected)


def test_nodes_on_one_processor_share_its_cores() -> None:
    placement = place_nodes(1, 1, "auto", 0)[0]
    config = EngineConfig(model=Path("m"))
    given = node_engine_config(config, placement, is_memory_explicit=False, num_cores=8)
    assert given.num_threads == 4


def load_serve(*argv: str) -> LoadedConfig:
    return load_config(
        "baton serve", SECTIONS, argv, {}, positional="model", presets=presets_of("gateway")
    )


def test_nodes_of_a_local_cluster_take_their_own_rows_of_the_performance_mode() -> None:
    loaded = load_serve("--performance-mode", "interactivity", "--device", "cpu")
    specs = child_specs(loaded, redis_url="redis://x", admin_token="t", log_format="json")
    variables = {spec.name: spec.environment for spec in specs}
    for node in ("prefill-0", "decode-0"):
        assert variables[node]["BATON_PERFORMANCE_MODE"] == "interactivity"
        assert "BATON_MAX_NUM_SEQS" not in variables[node]
    assert variables["gateway"]["BATON_MAX_NUM_QUEUED_REQS"] == "256"


def test_what_was_set_for_the_local_cluster_reaches_its_nodes() -> None:
    loaded = load_serve("--max-num-seqs", "7", "--device", "cpu")
    specs = child_specs(loaded, redis_url="redis://x", admin_token="t", log_format="json")
    assert [spec.environment.get("BATON_MAX_NUM_SEQS") for spec in specs] == ["7", "7", None]


def test_no_process_of_a_local_cluster_reads_the_file_of_them_all(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("prefill: 2")
    env = {"BATON_CONFIG": str(tmp_path / "c.yaml")}
    loaded = load_config("baton serve", SECTIONS, [], env, positional="model")
    specs = child_specs(loaded, redis_url="redis://x", admin_token="t", log_format="json")
    assert len(specs) == 4
    for spec in specs:
        read = load_config("baton child", (EngineConfig,), [], {**env, **spec.environment})
        assert read[EngineConfig].block_size == loaded[EngineConfig].block_size


def test_nodes_of_a_local_cluster_are_found_at_its_loopback_address() -> None:
    env = {"BATON_ADVERTISE_HOST": "elsewhere.test"}
    specs = child_specs(load_serve(), redis_url="redis://x:1", admin_token="t", log_format="json")
    for spec in specs[:-1]:
        sections = (MemberConfig, KVTransferConfig)
        read = load_config("baton x", sections, spec.arguments[1:], {**env, **spec.environment})
        assert read[MemberConfig].reachable_host == "127.0.0.1"


def test_show_config_of_a_local_cluster_names_what_its_nodes_choose_by_which_row() -> None:
    flags = ("--num-staging-slots", "3", "--performance-mode", "interactivity", "--device", "cuda")
    loaded = load_serve(*flags)
    text = render_config(loaded, left_to_nodes(loaded))
    line = next(line for line in text.splitlines() if "max_num_seqs" in line)
    assert line.lstrip().startswith("# max_num_seqs: prefill 32, decode 64 ")
    assert "performance-mode interactivity, row --max-num-seqs" in line
    assert yaml.safe_load(text)["kv_transfer"]["num_staging_slots"] == 3
