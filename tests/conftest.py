"""What must hold before the first test module is imported, and where tests can run."""

import os
from pathlib import Path

import pytest

pytest_plugins = ["tests.checkpoints"]

# Told by the driver's device files: most rooms' tests do without torch.
HAS_GPU = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))

# Triton chooses between compiler and interpreter when it is imported, by whichever test comes
# first. Without a GPU the kernel tests need the interpreter; nobody else launches Triton there.
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--model-examples", type=int, default=None, help="histories of the KV protocol's model"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))
