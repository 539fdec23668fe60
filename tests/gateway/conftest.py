from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from tests.gateway.model_folder import write_model_folder
from tests.gateway.running_gateway import RunningGateway

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def gateway(model_folder: Path) -> Iterator[RunningGateway]:
    """One prefill and one decode node that echo prompts; shared by the tests of a module."""
    running = RunningGateway(model_folder)
    yield running
    running.close()


@pytest.fixture
def new_gateway(model_folder: Path) -> Iterator[Callable[..., RunningGateway]]:
    """Makes gateways of a test's own."""
    made: list[RunningGateway] = []

    def make(**options: Any) -> RunningGateway:
        made.append(RunningGateway(model_folder, **options))
        return made[-1]

    yield make
    for running in made:
        running.close()


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{gateway.url}/v1", api_key="any", max_retries=0, timeout=20
    ) as made:
        yield made


@pytest.fixture(scope="module")
def http(gateway: RunningGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, timeout=20) as made:
        yield made
