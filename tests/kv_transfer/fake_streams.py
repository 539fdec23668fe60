"""CUDA streams and events for tests without a GPU: what they are given is done at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import pytest


def streams_do_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(wait_event=lambda event: None, wait_stream=lambda other: None)

    event = SimpleNamespace(record=lambda *_: None, synchronize=lambda: None, query=lambda: True)
    for name, value in {
        "Stream": stream,
        "current_stream": stream,
        "set_stream": lambda _: None,
        "synchronize": lambda _: None,
        "current_device": lambda: None,  # the index of a CPU
        "Event": lambda: event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
