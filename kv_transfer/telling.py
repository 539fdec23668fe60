"""How the node is told of its transfers, in the middle of other work: of a sweep over all of them,
of a frame, of a lost link. Whatever the node makes of what it is told, that work goes on.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)


def told(tell: Callable[[], bool | None]) -> bool:
    """Whether the node has taken it: False when it says so, or breaks."""
    try:
        return tell() is not False
    except Exception:  # the node's: all other transfers hang on who tells it
        logger.exception("the node could not be told what became of a transfer")
        return False
