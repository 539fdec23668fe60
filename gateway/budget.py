"""How many tokens a choice may have: what its client asked for, as far as there is room.

Room is in the model's context and, for log-probabilities of an answer that is not streamed, in the
memory that holds them until all of it is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import ContextLengthExceeded, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Held:
    """Log-probabilities: as many as an answer may hold, and those that come with one token of each
    choice."""

    most: int
    per_token: int


@dataclass(frozen=True, slots=True)
class Budget:
    """`asked` None takes `default`, or all that is left. `held` None: nothing is held."""

    max_model_len: int
    unit: str  # what the client wrote: "messages", "input" or "prompt"
    asked: int | None
    default: int | None = None
    field: str = "max_tokens"  # where the client wrote what it asked
    held: Held | None = None
    # What another API than OpenAI's says, of tokens in the prompt, wanted, and of the context.
    overflow: Callable[[int, int, int], str] | None = None

    def max_tokens(self, num_prompt_tokens: int) -> int:
        """Raises the typed refusal of what does not fit."""
        left = self.max_model_len - num_prompt_tokens
        room = max(left, 1)  # a prompt that leaves none still asks for a token: an overflow
        wanted = min(self.default or room, room) if self.asked is None else self.asked
        if wanted < 1:
            raise InvalidRequest(f"{self.field} must be at least 1.", param=self.field)
        if wanted > left:
            raise self._overflow(num_prompt_tokens, wanted)
        return wanted if self.held is None else self._holdable(wanted, self.held)

    def _holdable(self, wanted: int, held: Held) -> int:
        """An answer whose length nobody has asked for ends where it cannot be held any more."""
        most = held.most // held.per_token
        if wanted <= most:
            return wanted
        if self.asked is None and most > 0:
            return most
        raise InvalidRequest(
            f"{wanted} tokens of each choice have {wanted * held.per_token} log-probabilities; an "
            f"answer that is not streamed may have {held.most}. Lower {self.field}, n or the "
            "number of log-probabilities, or set stream.",
            param=self.field,
        )

    def _overflow(self, num_prompt_tokens: int, wanted: int) -> ContextLengthExceeded:
        if self.overflow is not None:
            said = self.overflow(num_prompt_tokens, wanted, self.max_model_len)
            return ContextLengthExceeded(said, param=self.unit)
        # LiteLLM recognises an overflow by this sentence.
        return ContextLengthExceeded(
            f"This model's maximum context length is {self.max_model_len} tokens. However, you "
            f"requested {num_prompt_tokens + wanted} tokens ({num_prompt_tokens} in the "
            f"{self.unit}, {wanted} in the completion). Please reduce the length of the "
            f"{self.unit} or completion.",
            param=self.unit,
        )
