"""One part of some work that others hang on: whatever it breaks over, that work goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Mapping


def isolated(
    part: Callable[[], object],
    complaint: str,
    logger: logging.Logger,
    *,
    extra: Mapping[str, object] | None = None,
) -> bool:
    """Whether it went well. If not, the log has the complaint, with the error and `extra`."""
    try:
        part()
    except Exception:  # a bug of the part; the rest of the work is others'
        logger.exception(complaint, extra=extra)
        return False
    return True
