"""What is kept of one request: when things happened and how it ended. No judgement yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """`error_class` groups failures in a report, e.g. "http_503 overloaded"."""

    error_class: str
    message: str


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request. Instants are seconds on the measurement's clock, which reads 0 at its start.

    `planned` is when the schedule wanted it sent, `sent` when it was. `chunk_times` holds one
    instant per chunk with content. `num_output_tokens` is the server's count where it gave
    one; `counted_by` says where the number comes from.
    """

    index: int
    planned: float
    sent: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    counted_by: Literal["usage", "tokenizer", "chunks"] = "chunks"
    failure: RequestFailure | None = None

    @property
    def succeeded(self) -> bool:
        return self.failure is None

    @property
    def time_to_first_token(self) -> float:
        return self.chunk_times[0] - self.sent

    @property
    def latency(self) -> float:
        """From sending to the last chunk with content."""
        return self.chunk_times[-1] - self.sent

    @property
    def time_per_output_token(self) -> float | None:
        """Over the tokens after the first; None when there is none."""
        if self.num_output_tokens <= 1:
            return None
        return (self.latency - self.time_to_first_token) / (self.num_output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: between each chunk and the one before."""
        return [later - earlier for earlier, later in pairwise(self.chunk_times)]
