"""Reads what a process exports in the Prometheus format."""

from __future__ import annotations

import urllib.request
from collections import Counter
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

ANSWERS_WITHIN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Sample:
    name: str
    labels: dict[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Scrape:
    """All samples of one process at one moment."""

    samples: tuple[Sample, ...]

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that have these labels; 0 when there are none."""
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def has(self, name: str) -> bool:
        return any(sample.name == name for sample in self.samples)

    def by(self, name: str, label: str) -> Counter[str]:
        """The values of a counter, summed by one of its labels."""
        found: Counter[str] = Counter()
        for sample in self.samples:
            if sample.name == name:
                found[sample.labels[label]] += round(sample.value)
        return found


def scrape(address: str) -> Scrape:
    """`address` is "host:port". Raises `OSError` when nobody answers."""
    with urllib.request.urlopen(
        f"http://{address}/metrics", timeout=ANSWERS_WITHIN_SECONDS
    ) as response:
        return parse(response.read().decode())


def parse(text: str) -> Scrape:
    return Scrape(
        tuple(
            Sample(sample.name, dict(sample.labels), sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        )
    )
