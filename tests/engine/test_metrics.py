"""An engine's and a transfer agent's numbers as Prometheus sees them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from prometheus_client import CollectorRegistry

from cluster.node import NodeLoad
from cluster.request import TokenDelta
from engine.block_copies import CopyKind
from engine.block_manager import BlockManager
from engine.host_copier import CopyStats
from engine.loop_parts import LoopStats
from engine.metrics import EngineCollector, HostTierCollector
from engine.restores import RestoreStats
from engine.schedule import ScheduledChunk, ScheduleDecision
from kv_transfer.metrics import TransferCollector
from kv_transfer.stats import TransferStats
from tests.sequences import BLOCK_SIZE, compute, make_sequence

if TYPE_CHECKING:
    from prometheus_client.registry import Collector


def values(collector: Collector) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(collector)
    return registry


def test_the_states_of_blocks_add_up_to_the_pool() -> None:
    load = NodeLoad(
        num_blocks=100, num_free_blocks=60, num_cached_blocks=20, num_quarantined_blocks=5
    )
    registry = values(EngineCollector(lambda: load, LoopStats()))
    states = {
        state: registry.get_sample_value("baton_kv_blocks", {"state": state})
        for state in ("free", "cached", "used", "quarantined")
    }
    assert states == {"free": 40, "cached": 20, "used": 35, "quarantined": 5}


def test_host_memory_is_counted_by_state_and_hits_by_tier() -> None:
    manager = BlockManager(4, BLOCK_SIZE, num_host_blocks=8)
    host = manager.host
    assert host is not None
    sequence = make_sequence(range(4 * BLOCK_SIZE))
    compute(manager, sequence)
    manager.free(sequence)
    (copy,) = host.take_copies()
    copier = SimpleNamespace(stats={CopyKind.SAVE: CopyStats(512, 0.5)})
    registry = values(HostTierCollector(host, cast("Any", copier), RestoreStats(num_restored=3)))
    labels = ({"state": state} for state in ("free", "cached", "moving"))
    assert [registry.get_sample_value("baton_host_kv_blocks", each) for each in labels] == [7, 0, 1]
    host.end(copy, [1])
    labels = ({"state": state} for state in ("free", "cached", "moving"))
    assert [registry.get_sample_value("baton_host_kv_blocks", each) for each in labels] == [7, 1, 0]
    saved = {"direction": "save"}
    assert registry.get_sample_value("baton_host_kv_bytes_total", saved) == 512
    assert registry.get_sample_value("baton_host_kv_seconds_total", saved) == 0.5
    restored = {"outcome": "restored"}
    assert registry.get_sample_value("baton_host_kv_given_blocks_total", restored) == 3


def test_hits_are_counted_by_tier_and_no_count_ever_falls() -> None:
    """What host memory gave back counts before its prompt has a token, if it ever gets one."""
    manager = BlockManager(4, BLOCK_SIZE, num_host_blocks=8)
    host = manager.host
    assert host is not None
    registry = values(EngineCollector(NodeLoad, LoopStats(), manager=manager))

    def hits() -> list[float | None]:
        name = "baton_prefix_hit_tokens_total"
        return [registry.get_sample_value(name, {"tier": tier}) for tier in ("device", "host")]

    first, other = make_sequence(range(4 * BLOCK_SIZE)), make_sequence(range(90, 98))
    compute(manager, first)
    manager.free(first)
    while copies := host.take_copies():
        for copy in copies:
            host.end(copy, [1] * len(copy.block_ids))
    compute(manager, other)
    manager.free(other)
    again = make_sequence(range(3 * BLOCK_SIZE + 1))
    assert manager.allocate(again, again.num_tokens)
    assert hits() == [2 * BLOCK_SIZE, 0]
    (load,) = host.take_copies()
    host.end(load, [1])
    assert hits() == [2 * BLOCK_SIZE, BLOCK_SIZE]


def test_what_the_engine_chose_is_one_series() -> None:
    choices = {"device": "cuda", "attention_backend": "gluon"}
    registry = values(EngineCollector(NodeLoad, LoopStats(), choices))
    assert registry.get_sample_value("baton_engine_info", choices) == 1


def test_counts_that_are_a_moment_apart_never_show_less_than_nothing() -> None:
    load = NodeLoad(num_blocks=8, num_free_blocks=8, num_quarantined_blocks=3)
    registry = values(EngineCollector(lambda: load, LoopStats()))
    assert registry.get_sample_value("baton_kv_blocks", {"state": "used"}) == 0


def test_the_collector_reads_live_counts() -> None:
    stats = LoopStats()
    registry = values(EngineCollector(lambda: NodeLoad(num_running=2, queued_tokens=9), stats))
    assert registry.get_sample_value("baton_engine_steps_total") == 0
    sequences = [make_sequence(range(3)), make_sequence(range(5))]
    chunks = (ScheduledChunk(sequences[0], 3), ScheduledChunk(sequences[1], 4))
    output = SimpleNamespace(
        sampled_sequences=(sequences[0],),
        deltas=(TokenDelta(sequence_id="a", token_ids=(1,), num_cached_tokens=2),),
    )
    stats.count(ScheduleDecision(chunks, preempted=(sequences[1],)), cast("Any", output), 0.5)
    expected = {
        "baton_engine_steps_total": 1,
        "baton_engine_step_seconds_total": 0.5,
        "baton_computed_tokens_total": 7,
        "baton_sampled_tokens_total": 1,
        "baton_cached_tokens_total": 2,
        "baton_preemptions_total": 1,
        "baton_sequences_running": 2,
        "baton_queued_tokens": 9,
    }
    assert {name: registry.get_sample_value(name) for name in expected} == expected


def test_transfers_are_counted_by_transport_and_failures_by_reason_and_policy() -> None:
    stats = TransferStats()
    registry = values(TransferCollector(stats, transports=lambda: ("shm", "shm")))
    stats.moved("shm", 100, 0.25)
    stats.moved("shm", 50, 0.25)
    stats.failures["link_lost", "fail"] += 1
    stats.commits_unknown += 2
    labels = {"transport": "shm"}
    assert registry.get_sample_value("baton_kv_transfer_bytes_total", labels) == 150
    assert registry.get_sample_value("baton_kv_transfer_frame_seconds_total", labels) == 0.5
    assert registry.get_sample_value("baton_kv_transport_in_use", labels) == 1
    failed = {"reason": "link_lost", "policy": "fail"}
    assert registry.get_sample_value("baton_kv_load_failures_total", failed) == 1
    assert registry.get_sample_value("baton_kv_commits_unknown_total") == 2


def test_a_peer_that_corrupts_kv_three_times_becomes_a_suspect_once() -> None:
    stats = TransferStats()
    registry = values(TransferCollector(stats, transports=tuple))
    became = [stats.corrupt("p0") for _ in range(4)]
    stats.corrupt("p1")
    assert became == [False, False, True, False]
    counted = registry.get_sample_value("baton_kv_corrupt_frames_total", {"peer": "p0"})
    assert counted == 4
    assert registry.get_sample_value("baton_kv_suspect_peer", {"peer": "p0"}) == 1
    assert registry.get_sample_value("baton_kv_suspect_peer", {"peer": "p1"}) is None
