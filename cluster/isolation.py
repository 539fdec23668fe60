"""One part of some work that others hang on: whatever it breaks over, that work goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Mapping

T = TypeVar("T")


def tried(part: Callable[[], T]) -> T | Exception:
    """What it gives, or what it broke over, for whom that concerns."""
    try:
        return part()
    except Exception as error:  # a bug of the part; the rest of the work is others'
        return error


def isolated(
    part: Callable[[], object],
    complaint: str,
    logger: logging.Logger,
    *,
    extra: Mapping[str, object] | None = None,
) -> bool:
    """Whether it went well. If not, the log has the complaint, with the error and `extra`."""
    outcome = tried(part)
    if isinstance(outcome, Exception):
        logger.error(complaint, exc_info=outcome, extra=extra)
        return False
    return True
