"""A local cluster whose nodes have two ranks: it serves, and serves again when one is lost."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from typing import TYPE_CHECKING

import openai
import pytest

from tests.checkpoints import REPOSITORY
from tests.e2e.cluster_process import ClusterProcess, children_of, command_line, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.e2e
POCKET = REPOSITORY / "baton" / "pocket_model"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ClusterProcess]:
    """Dummy weights in a shape that two ranks can share; the tokenizer of the pocket model."""
    facts = json.loads((POCKET / "config.json").read_text())
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(facts | heads | {"intermediate_size": 128}))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).symlink_to(POCKET / name)
    options = ("--load-format", "dummy", "--dtype", "float32", "-tp", "2", "--device", "cpu")
    running = ClusterProcess(str(tmp_path), *options)
    yield running
    running.stop()


def ask(cluster: ClusterProcess) -> str:
    with openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0) as client:
        answer = client.completions.create(
            model=cluster.model,
            prompt="some words " * 20,
            max_tokens=8,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
    return answer.choices[0].text


def ranks_of(cluster: ClusterProcess, node: str) -> list[int]:
    """Its worker processes."""
    children = children_of(cluster.child(node))
    return [pid for pid in children if "engine.tensor_parallel.worker" in command_line(pid)]


def are_gone(*pids: int) -> bool:
    return not any(map(command_line, pids))


def test_nodes_of_two_ranks_serve_again_after_a_rank_or_a_node_was_killed(
    cluster: ClusterProcess,
) -> None:
    before = ask(cluster)
    for victim in ("rank", "node"):
        (rank,) = ranks_of(cluster, "decode-0")
        node = cluster.child("decode-0")
        os.kill(rank if victim == "rank" else node, signal.SIGKILL)
        eventually(partial(are_gone, rank, node))
        eventually(partial(serves_again, cluster, before), seconds=60)


def serves_again(cluster: ClusterProcess, expected: str) -> bool:
    try:
        return ask(cluster) == expected
    except openai.APIError:
        return False
