"""One running cluster for the rows of a module.

On GPUs: `python -m benchmarks.gpu_suite --parts faults "faults, UCX"`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.cluster_rows import POLICIES, Rows, row_of, running_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALL_CHUNKS = ("--max-num-batched-tokens", "128")


@pytest.fixture(scope="module")
def plain_rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rows]:
    """Without a prefix cache, so that each hand-off carries the whole prompt, in chunks."""
    folder = tmp_path_factory.mktemp("plain")
    with running_rows(*SMALL_CHUNKS, "--no-enable-prefix-caching", folder=folder) as running:
        yield running
        assert running.evidence.looked == {"I3", "I7"}, "its witnesses were blind"


@pytest.fixture(scope="module")
def cached_rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rows]:
    """With the prefix cache and its index in Redis, behind two gateways."""
    folder = tmp_path_factory.mktemp("cached")
    with running_rows(*SMALL_CHUNKS, folder=folder, num_gateways=2) as running:
        yield running
        assert running.evidence.looked == {"I3", "I5", "I7"}, "its witnesses were blind"


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rows(plain_rows: Rows, policy: str, request: pytest.FixtureRequest) -> Iterator[Rows]:
    """The plain cluster, under each policy in turn."""
    plain_rows.set_policy(policy)
    with row_of(plain_rows, request) as row:
        yield row


@pytest.fixture
def cached(cached_rows: Rows, request: pytest.FixtureRequest) -> Iterator[Rows]:
    """The cluster with a cache and two gateways."""
    with row_of(cached_rows, request) as row:
        yield row
