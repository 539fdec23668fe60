"""What one measurement is asked to do: the options of `baton bench run`.

Names and meanings are those of `vllm bench serve`, so a command line can be carried over.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from cluster.errors import ConfigError
from cluster.options import option

Backend = Literal["openai", "openai-chat"]
MAX_COUNT = 10_000_000  # all is planned before the first request: more would end in no memory
MIN_RATE = 1e-6  # twelve days between two requests
METRICS = ("ttft", "tpot", "itl", "e2el")
SLO_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True)
class BenchConfig:
    backend: Backend = option(
        "openai", help="Route to measure: completions or chat completions.", group="Target"
    )
    base_url: str = option(
        "http://127.0.0.1:8000", help="Where the server is, with or without /v1.", group="Target"
    )
    model: str | None = option(
        None, help="Model name to ask for; without it the server's first.", group="Target"
    )
    tokenizer: str | None = option(
        None, help="A file tokenizer.json, or its folder; prompts are then text.", group="Target"
    )
    api_key: tuple[str, ...] = option(
        (),
        help="Bearer key; of several, as a gateway takes them, the first.",
        group="Target",
        secret=True,
        metavar="KEY",
    )
    extra_body: str = option(
        "", help="JSON object merged into every request.", group="Target", metavar="JSON"
    )
    temperature: float | None = option(
        None, help="Sampling temperature; without it the server's default.", group="Target"
    )
    ignore_eos: bool = option(
        True,
        help="Generate the whole output length; an extension of vLLM and Baton.",
        group="Target",
    )

    dataset_name: Literal["random"] = option("random", help="Kind of prompts.", group="Workload")
    num_prompts: int = option(1000, help="Number of requests.", group="Workload")
    random_input_len: int = option(
        1024, help="Prompt tokens, without the prefix.", group="Workload", aliases=("--input-len",)
    )
    random_output_len: int = option(
        128, help="Tokens to generate.", group="Workload", aliases=("--output-len",)
    )
    random_range_ratio: float = option(
        0.0, help="Lengths are uniform in [L(1-r), L(1+r)].", group="Workload"
    )
    random_prefix_len: int = option(0, help="Tokens that all prompts begin with.", group="Workload")
    random_vocab_size: int = option(
        1000, help="Token ids are drawn below this when there is no tokenizer.", group="Workload"
    )
    seed: int = option(0, help="Seed of prompts, lengths and arrivals.", group="Workload")

    request_rate: float | str = option(
        "inf", help="Arrivals per second; inf sends all at once.", group="Traffic", metavar="RPS"
    )
    burstiness: float | str = option(
        1.0,
        help="Shape of the gaps: 1 Poisson, below burstier, inf constant.",
        group="Traffic",
        metavar="X",
    )
    max_concurrency: int | None = option(None, help="Requests in flight at most.", group="Traffic")
    num_warmups: int = option(0, help="Requests sent before measuring.", group="Traffic")
    request_timeout: float = option(
        21600.0, help="Seconds a request may take.", group="Traffic", metavar="SECONDS"
    )

    percentile_metrics: str = option(
        "ttft,tpot,itl", help="Metrics in the table: ttft, tpot, itl, e2el.", group="Report"
    )
    metric_percentiles: str = option("90,99", help="Percentiles of each.", group="Report")
    goodput: tuple[str, ...] = option(
        (), help="Limits in ms a good request keeps: ttft:MS tpot:MS e2el:MS.", group="Report"
    )
    save_result: bool = option(
        False,
        help="Write a JSON file; so do --save-detailed and --result-filename.",
        group="Report",
    )
    save_detailed: bool = option(False, help="With every request in it.", group="Report")
    result_dir: str = option(".", help="Folder of the file.", group="Report", metavar="DIR")
    result_filename: str | None = option(None, help="Name of the file.", group="Report")
    label: str | None = option(None, help="Name of this run in the file.", group="Report")

    def __post_init__(self) -> None:
        self._check_target()
        self._check_numbers()
        _ = self.selected_metrics, self.percentiles, self.slo_seconds

    @property
    def server_url(self) -> str:
        """`base_url` as routes are added to it."""
        return self.base_url.rstrip("/").removesuffix("/v1").rstrip("/")

    @property
    def is_saved(self) -> bool:
        return self.save_result or self.save_detailed or self.result_filename is not None

    @property
    def requests_per_second(self) -> float:
        """Infinite when all requests are sent at once."""
        return float(self.request_rate)

    @property
    def gap_shape(self) -> float:
        """`burstiness` as a number; infinite when all gaps are alike."""
        return float(self.burstiness)

    @property
    def selected_metrics(self) -> tuple[str, ...]:
        names = tuple(name.strip() for name in self.percentile_metrics.split(",") if name.strip())
        for name in names:
            if name not in METRICS:
                raise ConfigError(
                    f"there is no metric {name!r}; choose from {', '.join(METRICS)}",
                    param="percentile_metrics",
                )
        return names

    @property
    def percentiles(self) -> tuple[float, ...]:
        """Each in [0, 100]."""
        try:
            values = tuple(float(text) for text in self.metric_percentiles.split(","))
        except ValueError:
            values = (math.nan,)
        if not all(0.0 <= value <= 100.0 for value in values):
            raise ConfigError(
                "must be numbers from 0 to 100 with commas between", param="metric_percentiles"
            )
        return values

    @property
    def slo_seconds(self) -> dict[str, float]:
        """Limit by metric name, in seconds; empty when no goodput is asked for."""
        limits: dict[str, float] = {}
        for text in self.goodput:
            name, colon, value = text.partition(":")
            if name not in SLO_METRICS or not colon:
                raise ConfigError(
                    f"{text!r} must be one of {', '.join(SLO_METRICS)}, a colon, and milliseconds",
                    param="goodput",
                )
            limits[name] = self._positive_number(value, "goodput") / 1e3
        return limits

    @property
    def extra_fields(self) -> dict[str, Any]:
        if not self.extra_body:
            return {}
        try:
            fields = json.loads(self.extra_body)
        except (ValueError, RecursionError):  # of a number or a depth that Python does not read
            fields = None
        if not isinstance(fields, dict):
            raise ConfigError("must be a JSON object", param="extra_body")
        return fields

    def _check_target(self) -> None:
        if not _is_http_url(self.base_url):
            raise ConfigError("must be an http:// or https:// URL", param="base_url")
        if not all(key.isascii() and key.isprintable() for key in self.api_key):
            raise ConfigError("must be printable ASCII", param="api_key")
        _ = self.extra_fields

    def _check_numbers(self) -> None:
        if self._positive_number(self.request_rate, "request_rate") < MIN_RATE:
            raise ConfigError(f"must be at least {MIN_RATE:f}", param="request_rate")
        self._positive_number(self.burstiness, "burstiness")
        self._positive_number(self.request_timeout, "request_timeout")
        for name, low in (
            *(("num_prompts", 1), ("random_input_len", 1), ("random_output_len", 1)),
            *(("num_warmups", 0), ("random_prefix_len", 0), ("random_vocab_size", 2)),
        ):
            if not low <= getattr(self, name) <= MAX_COUNT:
                raise ConfigError(f"must be in [{low}, {MAX_COUNT}]", param=name)
        if self.seed < 0:
            raise ConfigError("must not be negative", param="seed")
        if not 0.0 <= self.random_range_ratio < 1.0:
            raise ConfigError("must be in [0, 1)", param="random_range_ratio")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError("must be at least 1", param="max_concurrency")

    @staticmethod
    def _positive_number(value: float | str, param: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not number > 0.0:
            raise ConfigError("must be a positive number", param=param)
        return number


def _is_http_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:  # of a port that is none, or a bracket without its other
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc)
