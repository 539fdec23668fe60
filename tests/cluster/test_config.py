from __future__ import annotations

import traceback
from dataclasses import dataclass, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
import yaml

from cluster.config import (
    Presets,
    PresetValue,
    load_config,
    render_config,
    to_environment,
)
from cluster.errors import ConfigError, UsageError
from cluster.options import option

if TYPE_CHECKING:
    from collections.abc import Mapping


class Transport(StrEnum):
    ANY = "any"
    RDMA = "rdma"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    model: str = option(help="Folder of the model.")
    block_size: int = option(16, help="Tokens of one block.")
    max_model_len: int | None = option(None, help="Longest context.")
    memory: float = option(0.9, help="Share of 100% memory.", aliases=("--mem-fraction-static",))
    eager: bool = option(False, help="No graphs.")
    dtype: Literal["auto", "float32"] = option("auto", help="Type of the weights.")

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigError("must be at least 1", param="block_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVTransferConfig:
    mode: str = option("balanced", help="Mode.", choices=("balanced", "throughput"))
    served_model_name: tuple[str, ...] = option((), help="Names.")
    api_key: str | None = option(None, help="Key.", secret=True)
    tensor_parallel_size: int = option(1, help="GPUs.", short="-tp", group="parallel")
    require_transport: Transport = option(Transport.ANY, help="Transport.", advanced=True)
    chat_template: Path | None = option(None, help="Template.")


SECTIONS = (EngineConfig, KVTransferConfig)


def load(*argv: str, env: dict[str, str] | None = None, **how):  # type: ignore[no-untyped-def]
    return load_config("baton test", SECTIONS, argv, env or {}, positional="model", **how)


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_build_the_plain_dataclasses() -> None:
    loaded = load("m")
    assert loaded[EngineConfig] == EngineConfig(model="m")
    assert loaded[KVTransferConfig] == KVTransferConfig()
    assert is_dataclass(loaded[EngineConfig])
    assert loaded.origins["block_size"] == "default"
    assert loaded.origins["model"] == "argument MODEL"


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    path = write(tmp_path, "block_size: 1\nmemory: 0.1\ndtype: float32\n")
    env = {"BATON_BLOCK_SIZE": "2", "BATON_MEMORY": "0.2"}
    loaded = load("m", "--config", path, "--block-size", "3", env=env)
    engine = loaded[EngineConfig]
    assert (engine.block_size, engine.memory, engine.dtype) == (3, 0.2, "float32")
    assert loaded.origins["block_size"] == "flag --block-size"
    assert loaded.origins["memory"] == "environment BATON_MEMORY"
    assert loaded.origins["dtype"] == f"file {path}"
    assert [loaded.is_explicit(n) for n in ("block_size", "dtype", "eager")] == [True, True, False]


def test_the_file_may_be_flat_or_nested_by_section(tmp_path: Path) -> None:
    nested = write(tmp_path, "engine:\n  block-size: 8\nkv-transfer:\n  api_key: k\neager: true\n")
    loaded = load("m", env={"BATON_CONFIG": nested})
    assert loaded[EngineConfig].block_size == 8
    assert loaded[EngineConfig].eager is True
    assert loaded[KVTransferConfig].api_key == "k"


def test_lists_come_from_every_source(tmp_path: Path) -> None:
    expected = ("a", "b")
    path = write(tmp_path, "served_model_name: [a, b]\n")
    flags = ("--served-model-name", "a", "b")
    repeated = ("--served-model-name", "a", "--served-model-name", "b")
    name = "BATON_SERVED_MODEL_NAME"
    for loaded in (
        load("m", *flags),
        load("m", *repeated),
        load("m", "--config", path),
        load("m", env={name: "a, b"}),
        load("m", env={name: '["a", "b"]'}),
    ):
        assert loaded[KVTransferConfig].served_model_name == expected
    one = load("m", "--config", write(tmp_path, "served_model_name: a\n"))
    assert one[KVTransferConfig].served_model_name == ("a",)


def test_booleans_have_a_flag_for_each_side() -> None:
    assert load("m", "--eager")[EngineConfig].eager is True
    assert load("m", "--no-eager", env={"BATON_EAGER": "1"})[EngineConfig].eager is False


def test_short_flags_and_hidden_aliases_set_the_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded = load("m", "-tp", "4", "--mem-fraction-static", "0.5")
    assert loaded[KVTransferConfig].tensor_parallel_size == 4
    assert loaded[EngineConfig].memory == 0.5
    with pytest.raises(SystemExit) as left:
        load("--help")
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "-tp" in text
    assert "--mem-fraction-static" not in text


def test_help_is_grouped_and_hides_advanced_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("--help")
    text = capsys.readouterr().out
    for heading in ("Engine:", "Kv transfer:", "parallel:", "[default: 16]", "[required]", "100%"):
        assert heading in text
    assert "--require-transport" not in text
    assert text.count("Folder of the model.") == 1, "the positional says it, the flag refers to it"
    with pytest.raises(SystemExit):
        load("--help-all")
    assert "--require-transport" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["m", "--blok-size", "3"], "unknown flag --blok-size. Did you mean --block-size?"),
        (["m", "--block", "3"], "unknown flag --block"),
        (["m", "n"], "unexpected argument 'n'"),
        (["m", "--block-size"], "expected one argument"),
        (["m", "--block-size", "x"], "--block-size: should be a whole number, got 'x'"),
        (["m", "--block-size", "1" * 5_000], "--block-size: .*, got '1{79} …[.]$"),
        (["m", "--block-size", "0"], "--block-size: must be at least 1, got 0[.]$"),
        (["m", "--mode", "fast"], "--mode: must be one of balanced, throughput, got 'fast'"),
        (["m", "--dtype", "int3"], "--dtype: .*'auto' or 'float32'"),
        (["m", "--memory", "nan"], "--memory: .*finite"),
        (["m", "--model", "n"], "MODEL is given twice"),
        ([], "^[^-]*MODEL is required"),
    ],
)
def test_mistakes_on_the_command_line_are_one_usage_line(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        load(*argv)
    assert "\n" not in raised.value.message
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blok_size: 3", "unknown key 'blok_size'. Did you mean block_size?"),
        ("engine: {blok_size: 3}", "unknown key 'engine.blok_size'"),
        ("engine: {mode: balanced}", "unknown key 'engine.mode'"),
        ("block_size: true", "--block-size: a boolean does not fit here, got True .file"),
        ("block_size: 1.5", "--block-size"),
        ("eager: 1", "--eager: must be true or false"),
        ("block_size: 0", "--block-size: must be at least 1"),
        ("block_size: [1", "not valid YAML"),
        ("block_size: 2001-99-01", "not valid YAML"),
        pytest.param("block_size: " + "[" * 5000, "not valid YAML", id="deep"),
        ("block_size: 1\nblock_size: 2", "line 2: .*written twice"),
        ("block_size: 1\nengine: {block_size: 2}", "'block_size' is set in two places"),
        ("- a", "must be a mapping"),
        ("api_key: 5", r"--api-key: .*got \[redacted\]"),
    ],
)
def test_mistakes_in_the_file_are_one_config_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load("m", "--config", write(tmp_path, text))
    assert "\n" not in raised.value.message
    assert raised.value.exit_code == 3


def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot read .* No such file"):
        load("m", "--config", str(tmp_path / "absent.yaml"))


def test_a_file_that_a_variable_names_is_refused_as_that(tmp_path: Path) -> None:
    path = write(tmp_path, "serve: {prefill: 1}")
    with pytest.raises(ConfigError, match=r"unknown key 'serve'\. BATON_CONFIG names this file\.$"):
        load("m", env={"BATON_CONFIG": path})


def test_a_wrong_environment_value_names_the_variable() -> None:
    with pytest.raises(ConfigError, match=r"--block-size: .* \(environment BATON_BLOCK_SIZE\)"):
        load("m", env={"BATON_BLOCK_SIZE": "many"})


def test_a_list_too_deep_for_json_names_the_variable() -> None:
    with pytest.raises(ConfigError, match=r"--served-model-name: not a JSON list: .* \(env"):
        load("m", env={"BATON_SERVED_MODEL_NAME": "[" * 10_000})


def test_what_is_no_path_is_refused_without_a_class(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"template: is not a valid path, got \[1\] \(file"):
        load("m", "--config", write(tmp_path, "chat_template: [1]"))


def test_a_secret_is_not_in_the_traceback_either(tmp_path: Path) -> None:
    secret = str(123_456_789)
    with pytest.raises(ConfigError) as raised:
        load("m", "--config", write(tmp_path, f"api_key: [{secret}]"))
    assert secret not in "".join(traceback.format_exception(raised.value))


def test_empty_variables_are_unset_and_none_clears_an_optional() -> None:
    env = {"BATON_BLOCK_SIZE": "", "BATON_MAX_MODEL_LEN": "5"}
    loaded = load("m", "--max-model-len", "none", env=env)
    assert loaded[EngineConfig].max_model_len is None
    assert loaded[EngineConfig].block_size == 16


def test_a_preset_sits_between_file_and_default(tmp_path: Path) -> None:
    rows = {"block_size": PresetValue(64, "blocks"), "memory": PresetValue(0.95, "share")}

    def presets(given: Mapping[str, object]) -> Presets:
        assert given["memory"] == (0.5 if given["mode"] == "throughput" else 0.9)
        return {"mode": {"throughput": rows}}

    path = write(tmp_path, "memory: 0.5\n")
    loaded = load("m", "--mode", "throughput", "--config", path, presets=presets)
    assert loaded[EngineConfig].block_size == 64
    assert loaded.origins["block_size"] == "mode throughput, row blocks"
    assert loaded[EngineConfig].memory == 0.5
    assert load("m", presets=presets)[EngineConfig].block_size == 16


def test_show_config_is_yaml_that_loads_back_with_origins_and_no_secret(tmp_path: Path) -> None:
    loaded = load("m", "--show-config", "--require-transport", "rdma", env={"BATON_API_KEY": "s3"})
    assert loaded.show_config
    text = render_config(loaded)
    assert "s3" not in text
    assert "s3" not in repr(loaded[KVTransferConfig])
    assert "# flag --require-transport" in text
    assert "[redacted]" in text
    again = load("--config", write(tmp_path, text))
    assert again[EngineConfig] == loaded[EngineConfig]
    assert yaml.safe_load(text)["kv_transfer"]["require_transport"] == "rdma"


@dataclass(frozen=True, slots=True)
class StoreConfig:
    url: str = option("redis://here", help="Where.", secret=True)


def test_a_default_is_no_secret_and_still_a_comment() -> None:
    text = render_config(load_config("p", (StoreConfig,), ["--show-config"], {}))
    assert text == 'store:\n  # url: "redis://here"  # default\n'
    given = load_config("p", (StoreConfig,), ["--url", "redis://:s3@there"], {})
    assert "s3" not in render_config(given)


def test_to_environment_round_trips() -> None:
    engine = EngineConfig(model="m", eager=True, max_model_len=9, memory=0.25)
    transfer = KVTransferConfig(
        served_model_name=("a,b", "c"), api_key="k", chat_template=Path("/t")
    )
    loaded = load(env=to_environment(engine, transfer))
    assert loaded[EngineConfig] == engine
    assert loaded[KVTransferConfig] == transfer


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    block_size: int = option(99, help="The same option.")
    stream: bool = option(True, help="Stream.")


def test_sections_may_share_an_option_declared_first(tmp_path: Path) -> None:
    path = write(tmp_path, "gateway: {block_size: 4}\n")
    for argv, expected in (([], 16), (["--block-size", "8"], 8), (["--config", path], 4)):
        loaded = load_config("p", (EngineConfig, GatewayConfig), ["--model", "m", *argv], {})
        assert loaded[EngineConfig].block_size == loaded[GatewayConfig].block_size == expected


def test_one_name_with_two_types_is_a_bug() -> None:
    @dataclass(frozen=True)
    class OtherConfig:
        block_size: str = option("1", help="Again.")

    with pytest.raises(TypeError, match="block_size"):
        load_config("p", (EngineConfig, OtherConfig), [], {})
