"""Row K6 of the fault matrix: a node of two ranks loses one while its sibling sends."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.checkpoints import REPOSITORY
from tests.e2e.cluster_process import children_of, command_line
from tests.faults.cluster_rows import row_of, running_rows
from tests.faults.nemesis import is_gone, verify

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.faults.cluster_rows import Rows

pytestmark = pytest.mark.faults
POCKET = REPOSITORY / "baton" / "pocket_model"


def two_rank_model(folder: Path) -> Path:
    """Dummy weights in a shape that two ranks can share; the tokenizer of the pocket model."""
    facts = json.loads((POCKET / "config.json").read_text())
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 64}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(facts | heads | {"intermediate_size": 128}))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).symlink_to(POCKET / name)
    return folder


@pytest.fixture(scope="module")
def rank_rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rows]:
    folder = tmp_path_factory.mktemp("ranks")
    model = two_rank_model(folder / "model")
    sizes = (str(model), "--served-model-name", "pocket", "--load-format", "dummy", "-tp", "2")
    options = ("--device", "cpu", "--dtype", "float32", "--no-enable-prefix-caching")
    chunks = ("--max-num-batched-tokens", "128")
    with running_rows(*options, *chunks, folder=folder, sizes=sizes) as running:
        yield running


@pytest.mark.parametrize("node", ["prefill-0", "decode-0"])
def test_k6_one_rank_dies_in_the_middle_of_transfers(
    rank_rows: Rows, request: pytest.FixtureRequest, node: str
) -> None:
    with row_of(rank_rows, request) as rows:
        parent = rows.cluster.child(node)
        workers = [
            p for p in children_of(parent) if "engine.tensor_parallel.worker" in command_line(p)
        ]
        with rows.load() as history:
            history.wait_for_tokens(1)
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
            verify(lambda: bool(workers) and all(map(is_gone, workers)), "no rank was killed")
            rows.nemesis.note(f"killed ranks {workers} of {node}")
            verify(lambda: is_gone(parent), "the node outlived its rank")
        rows.check(history)
        rows.check_recovered()
