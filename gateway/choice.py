"""One choice of an answer: deltas in, text out.

Life of a choice
    1. `deliver` keeps the deltas that come from the dispatcher, unread.
    2. `take` reads all of them at once: ids become text, stop strings are looked for, and what
       is new is returned as one `Piece`. Deltas that came while the client was slow are thereby
       merged before they cost anything.
    3. Of that text, thoughts are told from the answer, and calls of tools from its words.
    4. A stop string, the nodes' own ending, or an error finishes it.

Text, log-probabilities and counts end with the token that completed a stop string, or the one call
that a client takes, also when more tokens came in the same delta.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.request import FinishReason, TokenDelta, TokenLogprobs
from gateway.stop_strings import StopMatcher
from gateway.thoughts import ThoughtSplitter
from gateway.tools.parser import ToolParser

if TYPE_CHECKING:
    from cluster.errors import ServingError
    from gateway.request import TextRules
    from gateway.tokenizer import Tokenizer
    from gateway.tools.formats import ToolCall
    from gateway.tools.parser import Parsed


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
    if rules.thought_marks is None:
        return None
    return ThoughtSplitter(rules.thought_marks, has_begun=rules.begins_thinking)


class Choice:
    """`index` is its number in the answer. `finish_reason` is set once it has ended well."""

    __slots__ = (
        "_detokenizer",
        "_keeps_ids",
        "_matcher",
        "_min_tokens",
        "_reads_by_token",
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
        ends_with_call = rules.one_call and self._tools is not None
        self._reads_by_token = bool(self._matcher or self._thoughts or ends_with_call)
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
        return piece

    def _say(self, text: str, piece: Piece) -> None:
        if self._thoughts is None:
            self._show(text, piece)
        else:
            self._keep(*self._thoughts.push(text), piece)

    def _keep(self, thought: str, answer: str, piece: Piece) -> None:
        self._show(answer, piece)
        if self.rules.shows_thoughts:
            piece.thought += thought

    def _show(self, answer: str, piece: Piece) -> None:
        if self._tools is None:
            piece.text += answer
        else:
            self._add(self._tools.push(answer), piece)

    def _add(self, parsed: Parsed, piece: Piece) -> None:
        """Words and calls. One call may be all that the client wants."""
        piece.text += parsed.content
        piece.calls += tuple(parsed.calls)
        if piece.calls and self.rules.one_call:
            piece.calls = piece.calls[:1]
            self.finish_reason = FinishReason.STOP

    @property
    def num_calls(self) -> int:
        """Of tools, so far."""
        return 0 if self._tools is None else self._tools.num_calls

    def _read(self, delta: TokenDelta, piece: Piece) -> None:
        if delta.error is not None:
            self.error = delta.error
            return
        if self.num_cached_tokens is None:
            self.num_cached_tokens = delta.num_cached_tokens
        if self._reads_by_token:
            self._read_by_token(delta, piece)
        else:
            self._read_plain(delta, piece)
        if delta.finish_reason is not None and not self.is_finished:
            self._finish(delta, piece)

    def _read_plain(self, delta: TokenDelta, piece: Piece) -> None:
        self._show(self._detokenizer.push(self._visible(delta)), piece)
        self._count(delta.token_ids, delta.logprobs, piece)

    def _read_by_token(self, delta: TokenDelta, piece: Piece) -> None:
        """So that nothing after a stop string, or the one call, is said or counted, and of thoughts
        each token is."""
        visible = len(self._visible(delta))
        for position, token_id in enumerate(delta.token_ids):
            text = self._detokenizer.push((token_id,)) if position < visible else ""
            self._count((token_id,), delta.logprobs[position : position + 1], piece)
            matcher = self._matcher if self.num_output_tokens > self._min_tokens else None
            self._say(text if matcher is None else matcher.push(text), piece)
            if self._thoughts is not None and self._thoughts.is_thinking:
                self.num_thought_tokens += 1
            if self.is_finished:
                return
            if matcher is not None and matcher.matched is not None:
                self._end(FinishReason.STOP, matcher.matched, piece)
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
        reason = delta.finish_reason or FinishReason.STOP
        is_named = delta.stop_token_id in self.rules.stop_token_ids
        stop: int | str | None = delta.stop_token_id if is_named else None
        rest = self._detokenizer.flush()
        if self._matcher is not None:
            self._say(self._matcher.push(rest), piece)
            if self._matcher.matched is not None:
                reason, stop = FinishReason.STOP, self._matcher.matched
            rest = self._matcher.flush()
        self._say(rest, piece)
        if not self.is_finished:
            self._end(reason, stop, piece)

    def _end(self, reason: FinishReason, stop_reason: int | str | None, piece: Piece) -> None:
        """What was held back, as it could have become a mark of thoughts or calls, is said."""
        self.finish_reason, self.stop_reason = reason, stop_reason
        if self._thoughts is not None:
            self._keep(*self._thoughts.flush(), piece)
        if self._tools is not None:
            self._add(self._tools.flush(), piece)
