"""The end of a process that hangs while it ends, as where a device or its driver never answers.

Counted by a thread in C, which needs neither the event loop nor the interpreter lock: it writes
where each thread stands, and ends the process with exit code 1.
"""

from __future__ import annotations

import faulthandler
import sys

CLOSE_SECONDS = 60.0


def end_within(seconds: float = CLOSE_SECONDS) -> None:
    """This process ends in so many seconds, if it has not before. Not to be taken back."""
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
