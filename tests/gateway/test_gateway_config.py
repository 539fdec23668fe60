"""A gateway's options: refused by name, secret where they must be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.config import load_config, render_config
from cluster.errors import ConfigError
from gateway.chat_template import ChatTemplate
from gateway.config import GatewayConfig
from gateway.tokenizer import Tokenizer


@pytest.mark.parametrize(
    "changes",
    [
        {"port": 70_000},
        {"max_body_bytes": 0},
        {"stream_interval": 0},
        {"stream_interval": 1025},
        {"first_token_timeout": 0.0},
        {"shutdown_timeout": -1.0},
        {"api_key": ("",)},
        {"separate_keys": True},
        {"api_key": ("key\n",)},
        {"api_key": ("key ",)},
        {"admin_token": "token\n"},
        {"admin_token": " token"},
        {"served_model_name": ("",)},
        {"redis_url": "http://127.0.0.1"},
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as raised:
        GatewayConfig(model=Path("m"), **changes)
    assert raised.value.param == next(iter(changes))


def test_secrets_are_not_shown(model_folder: Path) -> None:
    argv = [str(model_folder), "--api-key", "key-1", "--admin-token", "token-1"]
    env = {"BATON_REDIS_URL": "redis://:password-1@127.0.0.1:1/0"}
    loaded = load_config("baton gateway", [GatewayConfig], argv, env, positional="model")
    for text in (render_config(loaded), repr(loaded[GatewayConfig])):
        for secret in ("key-1", "token-1", "password-1"):
            assert secret not in text


def test_a_folder_without_a_tokenizer_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError):
        Tokenizer.from_folder(tmp_path)


def test_the_model_is_named_after_its_folder_unless_named(model_folder: Path) -> None:
    assert GatewayConfig(model=model_folder).model_names == (model_folder.name,)
    named = GatewayConfig(model=model_folder, served_model_name=("a", "b"))
    assert named.model_names == ("a", "b")


def test_special_tokens_are_read_in_both_spellings(model_folder: Path) -> None:
    tokens = Tokenizer.from_folder(model_folder).special_tokens
    assert (tokens["bos_token"], tokens["eos_token"]) == ("<bos>", "<eos>")
    template = ChatTemplate.from_folder(model_folder, tokens)
    assert template is not None
    assert template.render([{"role": "user", "content": "x"}]).startswith("<bos><|user|>x")


def test_a_wrong_flag_and_a_missing_model_end_with_their_exit_codes(tmp_path: Path) -> None:
    for argv, code in ((["--no-such-flag", "1"], 2), ([str(tmp_path)], 3)):
        result = subprocess.run(
            [sys.executable, "-m", "gateway", *argv, "--port", "0", "--admin-port", "0"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr
