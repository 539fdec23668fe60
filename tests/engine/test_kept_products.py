from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.startup import StartupReport
from engine.config import EngineConfig
from engine.engine import Engine
from engine.kept_products import bound_kept_products

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_what_an_operator_has_set_stays() -> None:
    environ = {"LRU_CACHE_CAPACITY": "7"}
    bound_kept_products(environ)
    assert environ == {"LRU_CACHE_CAPACITY": "7", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}


def test_an_engine_on_a_cpu_keeps_no_product_for_every_length_of_a_prompt(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the libraries' 1024 each takes about half a megabyte."""
    seen: dict[str, str] = {}
    monkeypatch.setattr("engine.engine.bound_kept_products", lambda: bound_kept_products(seen))
    config = EngineConfig(model=checkpoints / "qwen2", device="cpu", num_threads=1)
    Engine.create(config, progress=StartupReport(sink=lambda fact: None)).close()
    assert set(seen.values()) == {"256"}
