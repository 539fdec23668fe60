"""How the node is told of its transfers, in the middle of other work: of a sweep over all of them,
of a frame, of a lost link. Whatever the node makes of what it is told, that work goes on.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cluster.isolation import tried

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)


def told(tell: Callable[[], bool | None]) -> bool:
    """Whether the node has taken it: False when it says so, or breaks."""
    answer = tried(tell)
    if isinstance(answer, Exception):
        logger.error("the node could not be told what became of a transfer", exc_info=answer)
        return False
    return answer is not False
