"""How large a message of the control plane may be.

A message that is larger than its receiver takes ends the whole stream that it came by, and with it
everybody's work that runs over that stream. So who receives says what it takes, in its welcome or
hello, and who sends looks before it sends: what does not fit ends one request, in a typed error.
A node takes the longest prompt that it can serve; nothing else of a message grows with a request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.errors import RequestTooLarge

if TYPE_CHECKING:
    from google.protobuf.message import Message

# Everything but a prompt. It is also what a peer takes that does not say.
BASE_MESSAGE_BYTES = 4 * 2**20
# The longest varint of a token id.
TOKEN_BYTES = 5


def message_limit(max_model_len: int) -> int:
    """Bytes of the largest message of a node whose prompts and outputs are that long."""
    return BASE_MESSAGE_BYTES + TOKEN_BYTES * max_model_len


def limit_of(said: int) -> int:
    """What a peer takes that said this."""
    return said or BASE_MESSAGE_BYTES


def check_fits(message: Message, max_bytes: int) -> None:
    """Raises `RequestTooLarge` for what the peer does not take."""
    num_bytes = message.ByteSize()
    if num_bytes > max_bytes:
        raise RequestTooLarge(
            f"The request takes {num_bytes} bytes on its way to a node that takes {max_bytes}."
        )
