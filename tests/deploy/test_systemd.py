"""The unit starts programs that there are, with settings that they take, and lets them end."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

from cluster.member_config import MemberConfig
from cluster.options import options_of
from gateway.config import GatewayConfig

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "baton@.service"


@pytest.fixture
def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNIT)
    return parser


def test_it_waits_longer_than_running_requests_may_take(unit: configparser.ConfigParser) -> None:
    service = unit["Service"]
    given = re.search(r"BATON_SHUTDOWN_TIMEOUT=(\d+)", UNIT.read_text())
    assert given is not None
    assert int(service["TimeoutStopSec"]) > int(given.group(1))


def test_its_settings_are_options_of_every_program() -> None:
    known = [{each.variable for each in options_of(kind)} for kind in (GatewayConfig, MemberConfig)]
    settings = set(re.findall(r"(BATON_[A-Z_]+)=", UNIT.read_text()))
    assert settings
    assert settings <= known[0] & known[1]


def test_a_wrong_option_is_not_tried_again_and_again(unit: configparser.ConfigParser) -> None:
    assert unit["Service"]["RestartPreventExitStatus"].split() == ["2", "3"]
    assert unit["Service"]["Type"] == "notify"
    assert unit["Service"]["ExecStart"].endswith("/baton %i")
