"""The options of a gateway. Names and meanings are vLLM's where vLLM has the option."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 (flags derive from the types at run time)
from typing import Literal

from cluster.options import option, refused
from cluster.performance_mode import HELP as PERFORMANCE_MODE_HELP
from cluster.performance_mode import PerformanceMode
from cluster.redis_client import check_redis_url
from cluster.request import KVLoadFailurePolicy
from gateway.policy import MAX_STREAM_INTERVAL

LogLevel = Literal["debug", "info", "warning", "error"]

_HTTP = "HTTP"
_MODEL = "Model"
_CLUSTER = "Cluster"
_LIMITS = "Limits"
_STREAM = "Streaming"
_ADMIN = "Admin API"

MiB = 1024 * 1024
_POSITIVE = (
    "max_body_bytes",
    "max_num_reqs",
    "max_num_queued_reqs",
    "max_num_queued_tokens",
    "max_whole_logprobs",
)
_TIMEOUTS = (
    "body_timeout",
    "first_token_timeout",
    "stream_timeout",
    "write_timeout",
    "probe_after",
    "probe_timeout",
)
_NOT_NEGATIVE = (
    "shutdown_timeout",
    "local_prefill_tokens",
    "sse_keep_alive_interval",
    "pulse_timeout",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """One gateway: where it listens, what it serves, how much it takes in."""

    model: Path = option(
        help="Folder of a Hugging Face checkpoint: tokenizer.json, config.json, chat template.",
        group=_MODEL,
        metavar="FOLDER",
    )
    served_model_name: tuple[str, ...] = option(
        (),
        help="Names clients may use; the first is the one shown. claude-* matches many. "
        "Default: the folder's name.",
        group=_MODEL,
        metavar="NAME",
    )
    host: str = option("127.0.0.1", help="Address of the public HTTP server.", group=_HTTP)
    port: int = option(
        8000, help="Port of the public HTTP server; 0 takes a free one.", group=_HTTP
    )
    api_key: tuple[str, ...] = option(
        (),
        help="Keys clients must present, as Bearer or x-api-key. None: everyone may ask.",
        group=_HTTP,
        secret=True,
        metavar="KEY",
    )
    separate_keys: bool = option(
        False,
        help="Keep what is cached for different API keys apart: none learns from times or from "
        "cached_tokens what another has asked. What all of them send is computed for each.",
        group=_HTTP,
        advanced=True,
    )
    allowed_origins: tuple[str, ...] = option(
        (),
        help="Web pages whose scripts may ask, as http://localhost:3000; * is any. Default: none.",
        group=_HTTP,
        metavar="ORIGIN",
    )
    max_body_bytes: int = option(2 * MiB, help="Largest request body.", group=_HTTP)
    body_timeout: float = option(
        60.0, help="Seconds a client has to send a request body.", group=_HTTP, advanced=True
    )
    shutdown_timeout: float = option(
        60.0, help="Seconds running requests have to finish after SIGTERM.", group=_HTTP
    )
    log_level: LogLevel = option("info", help="Least severe log line written.", group=_HTTP)
    log_format: str = option(
        "auto",
        help="Form of log lines. auto: for people on a terminal, JSON elsewhere.",
        choices=("auto", "console", "json"),
        group=_HTTP,
        advanced=True,
    )
    admin_host: str = option("127.0.0.1", help="Address of the admin HTTP server.", group=_ADMIN)
    admin_port: int = option(8001, help="Port of the admin HTTP server; 0 takes one.", group=_ADMIN)
    admin_token: str | None = option(
        None,
        help="Bearer token of the admin API. Where systemd, Kubernetes or compose start this, set "
        "BATON_ADMIN_TOKEN from a secret. Default: one is drawn and left on this machine for "
        "`baton admin` of the same user; where that cannot be written, it is logged once.",
        group=_ADMIN,
        secret=True,
        metavar="TOKEN",
    )
    redis_url: str = option(
        "redis://127.0.0.1:6379/0",
        help="Registry of nodes: redis://, rediss:// or unix://. Default: "
        "redis://127.0.0.1:6379/0; `baton serve` starts a private one.",
        group=_CLUSTER,
        secret=True,
        metavar="URL",
    )
    local_prefill_tokens: int = option(
        0,
        help="A prompt with at most this many uncached tokens is prefilled on the decode node. "
        "0: never.",
        group=_CLUSTER,
    )
    kv_load_failure_policy: KVLoadFailurePolicy = option(
        KVLoadFailurePolicy.FAIL,
        help="When KV does not reach the decode node. fail: the request ends in a typed error, or "
        "is tried once more elsewhere if it has no token yet. recompute: the decode node computes "
        "what is missing.",
        group=_CLUSTER,
    )
    allow_policy_header: bool = option(
        False,
        help="Let a request choose its own policy by x-baton-kv-load-failure-policy.",
        group=_CLUSTER,
        advanced=True,
    )
    stream_recovery: bool = option(
        False,
        help="Continue a stream on other nodes when those that worked on it are lost.",
        group=_CLUSTER,
    )
    probe_after: float = option(
        1.5,
        help="Seconds a node that owes tokens may be silent before it is asked whether its event "
        "loop lives.",
        group=_CLUSTER,
        advanced=True,
    )
    probe_timeout: float = option(
        3.0,
        help="Seconds it has to answer that question before its requests end with node_lost.",
        group=_CLUSTER,
        advanced=True,
    )
    pulse_timeout: float = option(
        1.25,
        help="Seconds a node's process may leave pings unanswered before its requests end with "
        "node_lost; up to three times as long where its answers were late before. A busy node "
        "answers. 0: no pings, only the question above.",
        group=_CLUSTER,
        advanced=True,
    )
    performance_mode: PerformanceMode = option(
        "balanced", help=PERFORMANCE_MODE_HELP, group=_LIMITS
    )
    max_num_reqs: int = option(
        4096, help="Most sequences in flight; more are refused as overloaded.", group=_LIMITS
    )
    max_num_queued_reqs: int = option(
        1024, help="Most sequences that wait for their first token.", group=_LIMITS
    )
    max_num_queued_tokens: int = option(
        4_000_000,
        help="Most prompt tokens of sequences that wait for their first token.",
        group=_LIMITS,
    )
    max_whole_logprobs: int = option(
        4_194_304,
        help="Most log-probabilities that an answer which is not streamed may hold: choices times "
        "max_tokens times (1 + top_logprobs). More is refused; without max_tokens the answer ends "
        "there. A stream may have any number.",
        group=_LIMITS,
        advanced=True,
    )
    first_token_timeout: float = option(
        600.0, help="Seconds until a first token, after which a request ends.", group=_LIMITS
    )
    stream_timeout: float = option(
        120.0, help="Seconds between tokens, after which a request ends.", group=_LIMITS
    )
    write_timeout: float = option(
        30.0, help="Seconds a client may leave what it is sent unread.", group=_LIMITS
    )
    sse_keep_alive_interval: float = option(
        10.0,
        help="Seconds without a token after which a stream gets a comment line, or a message of "
        "Anthropic's API a ping. 0: never.",
        group=_STREAM,
    )
    stream_interval: int = option(
        1, help="Tokens per streamed chunk; the first token is never held back.", group=_STREAM
    )

    def __post_init__(self) -> None:
        for name in ("port", "admin_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise refused(name, "must be in [0, 65535]")
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise refused(name, "must be at least 1")
        for name in _TIMEOUTS:
            if not getattr(self, name) > 0:
                raise refused(name, "must be above 0")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise refused(name, "must not be negative")
        if not 1 <= self.stream_interval <= MAX_STREAM_INTERVAL:
            raise refused("stream_interval", f"must be in [1, {MAX_STREAM_INTERVAL}]")
        if not all(key and _can_be_sent(key) for key in self.api_key):
            raise refused("api_key", "must be printable ASCII, no blanks around it, and not empty")
        if self.separate_keys and not self.api_key:
            raise refused("separate_keys", "needs API keys")
        if not _can_be_sent(self.admin_token or ""):
            raise refused("admin_token", "must be printable ASCII, no blanks around it")
        check_redis_url(self.redis_url)
        if any(not name for name in self.served_model_name):
            raise refused("served_model_name", "must not be empty")

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names clients may use, the shown one first."""
        return self.served_model_name or (self.model.resolve().name,)


def _can_be_sent(key: str) -> bool:
    """In a header, of which what is around its value is cut off."""
    return key.isascii() and key.isprintable() and key == key.strip()
