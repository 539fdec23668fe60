from __future__ import annotations

from typing import TYPE_CHECKING

import openai
import pytest

from tests.e2e.cluster_process import ClusterProcess

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterProcess]:
    """One local cluster per module: the pocket model, one prefill and one decode node."""
    running = ClusterProcess("--dtype", "float32")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(cluster: ClusterProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0, timeout=60) as made:
        yield made
