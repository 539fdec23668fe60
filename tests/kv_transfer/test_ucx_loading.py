"""Why UCX cannot be had is said as it is: not there, or there and of no use."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING

import pytest

from baton.doctor_probe import probe_ucx
from cluster.errors import ConfigError
from kv_transfer.transports.ucx import UcxTransport

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

TOO_OLD = ImportError("Support for UCX 1.16.0 has ended.")
MISSING = ModuleNotFoundError("No module named 'ucxx'", name="ucxx")


class Refusing(MetaPathFinder):
    def __init__(self, error: ImportError) -> None:
        self.error = error

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if fullname == "ucxx":
            raise self.error


def refuse(monkeypatch: pytest.MonkeyPatch, error: ImportError) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "ucxx"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Refusing(error), *sys.meta_path])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MISSING, "ucxx is not installed"),
        (TOO_OLD, "installed, but cannot be loaded: Support for UCX 1.16.0 has ended."),
    ],
)
def test_a_node_and_the_doctor_say_why_ucx_cannot_be_loaded(
    error: ImportError, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, error)
    with pytest.raises(ConfigError) as refused:
        UcxTransport(ucx_tls=None, moves_device_memory=False, connect_seconds=1.0)
    assert said in str(refused.value)
    ((_, state, detail),) = probe_ucx()
    assert state == "problem"
    assert said in detail


def test_transports_that_this_machine_has_not_are_a_line_to_a_node_and_the_doctor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match="may use among the transports 'none'") as refused:
        UcxTransport(ucx_tls="none", moves_device_memory=False, connect_seconds=1.0)
    assert refused.value.param == "ucx_tls"
    monkeypatch.setenv("UCX_TLS", "nothing")
    ((_, state, detail),) = probe_ucx()
    assert state == "problem"
    assert "may use among the transports 'nothing'" in detail
