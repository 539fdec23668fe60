"""One choice of an answer: deltas in, text out.

Life of a choice
    1. `deliver` keeps the deltas that come from the dispatcher, unread.
    2. `take` reads all of them at once: ids become text, stop strings are looked for, and what
       is new is returned as one `Piece`. Deltas that came while the client was slow are thereby
       merged before they cost anything.
    3. Of that text, thoughts are told from the answer, and calls of tools from its words.
    4. A stop string, the nodes' own ending, or an error finishes it.

Text, log-probabilities and counts end with the token that completed a stop string, also when
more tokens came in the same delta.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.request import FinishReason, TokenDelta, TokenLogprobs
from gateway.request import Thoughts
from gateway.stop_strings import StopMatcher
from gateway.thoughts import ThoughtSplitter
from gateway.tools.parser import ToolParser

if TYPE_CHECKING:
    from cluster.errors import ServingError
    from gateway.request import TextRules
    from gateway.tokenizer import Tokenizer
    from gateway.tools.formats import ToolCall


@dataclass(slots=True)
class Piece:
    """What is new in a choice. `token_ids` and `logprobs` are those that were counted."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    calls: tuple[ToolCall, ...] = ()
    thought: str = ""

    def extend(self, later: Piece) -> None:
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.calls += later.calls
        self.thought += later.thought


def _splitter(rules: TextRules) -> ThoughtSplitter | None:
    if rules.thoughts is Thoughts.NONE:
        return None
    return ThoughtSplitter(has_begun=rules.begins_thinking)


class Choice:
    """`index` is its number in the answer. `finish_reason` is set once it has ended well."""

    __slots__ = (
        "_detokenizer",
        "_is_plain",
        "_keeps_ids",
        "_matcher",
        "_min_tokens",
        "_thoughts",
        "_tools",
        "_unread",
        "error",
        "finish_reason",
        "index",
        "num_cached_tokens",
        "num_output_tokens",
        "num_thought_tokens",
        "num_unread_tokens",
        "rules",
        "stop_reason",
    )

    def __init__(
        self, index: int, tokenizer: Tokenizer, rules: TextRules, *, keeps_ids: bool
    ) -> None:
        """`keeps_ids`: pieces hold token ids, too."""
        self.index = index
        self.rules = rules
        self.error: ServingError | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.num_cached_tokens: int | None = None
        self.num_output_tokens = 0
        self.num_thought_tokens = 0
        self.num_unread_tokens = 0
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=rules.skip_special_tokens)
        self._matcher = (
            StopMatcher(rules.stops, include=rules.include_stop) if rules.stops else None
        )
        self._thoughts = _splitter(rules)
        self._tools = None if rules.tool_format is None else ToolParser(rules.tool_format)
        self._is_plain = self._thoughts is None and self._tools is None
        self._min_tokens = rules.min_tokens
        self._keeps_ids = keeps_ids
        self._unread: list[TokenDelta] = []

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def has_unread(self) -> bool:
        return bool(self._unread)

    def deliver(self, delta: TokenDelta) -> None:
        self._unread.append(delta)
        self.num_unread_tokens += len(delta.token_ids)

    def take(self, max_tokens: int | None = None) -> Piece:
        """What came since the last call: all of it, or so many tokens and what came with the last
        of them. After the ending there is nothing more."""
        unread, num_tokens = self._unread, self.num_unread_tokens
        most = num_tokens if max_tokens is None else max_tokens
        self._unread, self.num_unread_tokens = [], 0
        piece = Piece()
        for index, delta in enumerate(unread):
            if self.is_finished:
                break
            if max_tokens is not None and most <= 0:
                self._unread, self.num_unread_tokens = unread[index:], num_tokens
                break
            most -= len(delta.token_ids)
            num_tokens -= len(delta.token_ids)
            self._read(delta, piece)
        if not self._is_plain:
            self._sort(piece)
        return piece

    def _sort(self, piece: Piece) -> None:
        """Thoughts were told apart as they came; what is left of them, and calls, are told here."""
        if self._thoughts is not None and self.finish_reason is not None:
            self._keep(*self._thoughts.flush(), piece)
        if self._tools is not None and (piece.text or self.finish_reason is not None):
            self._find_calls(self._tools, piece)

    def _say(self, text: str, piece: Piece) -> None:
        if self._thoughts is None:
            piece.text += text
        else:
            self._keep(*self._thoughts.push(text), piece)

    def _keep(self, thought: str, answer: str, piece: Piece) -> None:
        piece.text += answer
        if self.rules.thoughts is Thoughts.SHOWN:
            piece.thought += thought

    @property
    def num_calls(self) -> int:
        """Of tools, so far."""
        return 0 if self._tools is None else self._tools.num_calls

    def _find_calls(self, tools: ToolParser, piece: Piece) -> None:
        found = [tools.push(piece.text)]
        if self.finish_reason is not None:
            found.append(tools.flush())
        piece.text = "".join(each.content for each in found)
        piece.calls = tuple(call for each in found for call in each.calls)
        if piece.calls and self.rules.one_call:
            piece.calls = piece.calls[:1]
            self.finish_reason = FinishReason.STOP

    def _read(self, delta: TokenDelta, piece: Piece) -> None:
        if delta.error is not None:
            self.error = delta.error
            return
        if self.num_cached_tokens is None:
            self.num_cached_tokens = delta.num_cached_tokens
        if self._matcher is None and self._thoughts is None:
            self._read_plain(delta, piece)
        else:
            self._read_by_token(delta, piece)
        if delta.finish_reason is not None and not self.is_finished:
            self._finish(delta, piece)

    def _read_plain(self, delta: TokenDelta, piece: Piece) -> None:
        piece.text += self._detokenizer.push(self._visible(delta))
        self._count(delta.token_ids, delta.logprobs, piece)

    def _read_by_token(self, delta: TokenDelta, piece: Piece) -> None:
        """So that nothing after a stop string is counted, and of thoughts each token."""
        visible = len(self._visible(delta))
        for position, token_id in enumerate(delta.token_ids):
            text = self._detokenizer.push((token_id,)) if position < visible else ""
            self._count((token_id,), delta.logprobs[position : position + 1], piece)
            matcher = self._matcher if self.num_output_tokens > self._min_tokens else None
            self._say(text if matcher is None else matcher.push(text), piece)
            if self._thoughts is not None and self._thoughts.is_thinking:
                self.num_thought_tokens += 1
            if matcher is not None and matcher.matched is not None:
                self.finish_reason = FinishReason.STOP
                self.stop_reason = matcher.matched
                return

    def _visible(self, delta: TokenDelta) -> tuple[int, ...]:
        """Without the token that ended the sequence, unless the client wants to see it."""
        if delta.stop_token_id is None or self.rules.include_stop:
            return delta.token_ids
        return delta.token_ids[:-1]

    def _count(
        self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...], piece: Piece
    ) -> None:
        self.num_output_tokens += len(token_ids)
        if self._keeps_ids:
            piece.token_ids += token_ids
            piece.logprobs += logprobs

    def _finish(self, delta: TokenDelta, piece: Piece) -> None:
        rest = self._detokenizer.flush()
        if self._matcher is not None:
            self._say(self._matcher.push(rest), piece)
            if self._matcher.matched is not None:
                self.finish_reason = FinishReason.STOP
                self.stop_reason = self._matcher.matched
                return
            rest = self._matcher.flush()
        self._say(rest, piece)
        self.finish_reason = delta.finish_reason
        if delta.stop_token_id in self.rules.stop_token_ids:
            self.stop_reason = delta.stop_token_id
