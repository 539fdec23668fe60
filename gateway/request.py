"""What one client asked, validated: whoever holds a `Request` need not check it again.

A request has one or more prompts and `n` choices for each; every choice becomes one
`SequenceRequest`, numbered prompt by prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from cluster.request import MAX_SEED, KVLoadFailurePolicy, SamplingParams, SequenceRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.thoughts import ThoughtMarks
    from gateway.tools.formats import ToolFormat

MAX_SEQUENCES = 64
# Far and odd, so that the second choice of seed 7 is not the first of seed 8.
_SEED_STRIDE = 0x1E3779B97F4A7C15


class Route(StrEnum):
    """The label of metrics and logs, and which shape the answer has."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    MESSAGES = "messages"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """`text` is what the client wrote, kept only to be echoed."""

    token_ids: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRules:
    """How ids become the text a client sees."""

    stops: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # those the client named
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0  # before them no stop string counts
    tool_format: ToolFormat | None = None  # None: no tool was offered, all text is content
    one_call: bool = False  # the first call of a tool ends the answer
    thought_marks: ThoughtMarks | None = None  # None: the model has no thoughts
    shows_thoughts: bool = True
    begins_thinking: bool = False  # the prompt has opened the thoughts


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRules:
    is_stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """`sampling[i]` belongs to prompt `i`: what a prompt may still generate depends on its length.

    `deadline_seconds` is what was left at arrival.
    """

    route: Route
    request_id: str
    model: str
    created: int  # Unix seconds
    prompts: tuple[Prompt, ...]
    sampling: tuple[SamplingParams, ...]
    n: int
    text: TextRules
    stream: StreamRules
    echo: bool = False
    return_token_ids: bool = False
    cache_salt: bytes = b""
    priority: int = 0
    deadline_seconds: float | None = None
    kv_load_failure_policy: KVLoadFailurePolicy | None = None  # None: the gateway's
    repeated: Mapping[str, Any] = field(default_factory=dict)  # by an answer of the Responses API

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.n

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def message_id(self) -> str | None:
        """Of a request of Anthropic's API, whose errors have another shape."""
        return self.request_id if self.route is Route.MESSAGES else None

    @property
    def wants_logprobs(self) -> bool:
        return self.sampling[0].num_logprobs is not None

    def sequence(
        self, index: int, sequence_id: str, seconds_since_arrival: float = 0.0
    ) -> SequenceRequest:
        """Choices of one prompt draw differently; the first draws as it would alone."""
        number = index // self.n
        sampling = self.sampling[number]
        seed = (sampling.seed + (index % self.n) * _SEED_STRIDE) % MAX_SEED
        deadline = self.deadline_seconds
        return SequenceRequest(
            sequence_id=sequence_id,
            request_id=self.request_id,
            prompt_token_ids=self.prompts[number].token_ids,
            sampling=replace(sampling, seed=seed),
            cache_salt=self.cache_salt,
            deadline_seconds=(
                None if deadline is None else max(0.0, deadline - seconds_since_arrival)
            ),
            priority=self.priority,
        )
