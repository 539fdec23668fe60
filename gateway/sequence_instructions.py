"""What a sequence's machine tells its dispatcher to do, and how long it waits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.request import TokenDelta


@dataclass(frozen=True, slots=True)
class Deliver:
    """Goes to the client, after all that was delivered before."""

    delta: TokenDelta


@dataclass(frozen=True, slots=True)
class CancelPrefill:
    """The prefill node must stop and free what this sequence holds."""


@dataclass(frozen=True, slots=True)
class CancelDecode:
    """The decode node must stop and free what this sequence holds."""


@dataclass(frozen=True, slots=True)
class AskDecode:
    """The prefill node is gone; the decode node must say what it has."""


Instruction = Deliver | CancelPrefill | CancelDecode | AskDecode
Instructions = list[Instruction]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Longest silences, in seconds, before a sequence is given up."""

    first_token: float = math.inf
    between_tokens: float = math.inf
