"""Marks that a model writes into its text, met in pieces that cut anywhere."""

from __future__ import annotations


def overlap(text: str, marker: str) -> int:
    """How many characters at the end of `text` may begin `marker`, all of which is not there."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
