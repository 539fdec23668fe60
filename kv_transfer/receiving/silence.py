"""Whether a data link swallows what is posted on it, while the control stream works.

Life of a silence
    1. A renewal comes by the control stream, and says how many messages (headers and commits) the
       sender has posted on the data link. Not all of them are here.
    2. Nothing comes. No payload is on its way, so the next message is one of a few kilobytes, and
       nobody here lets it wait: a link that moves at all, however slowly, brings it in a moment.
    3. It lasts for `SILENT_SECONDS`: the link is given up. Any message that comes ends the silence.

In the middle of a payload a link that swallows looks like a slow one: no transport says how much of
it has come. That is given up with its transfer, after `stall_seconds`.

Only time in which this process looks counts: one that was stopped has heard nothing of what waits
in its sockets. A sender that is stopped says nothing new, and what it has said it has posted.
"""

from __future__ import annotations

from kv_transfer.sweeping import MAX_SECONDS

SILENT_SECONDS = 10.0


class Silence:
    """Of one session. Pure: time is an argument."""

    def __init__(self) -> None:
        self._num_posted = 0
        self._num_heard = 0
        self._seconds = 0.0
        self._looked_at = 0.0

    def told(self, num_posted: int) -> None:
        """The sender has posted so many messages, it says."""
        self._num_posted = num_posted

    def heard(self) -> None:
        """One has come."""
        self._num_heard += 1
        self._seconds = 0.0

    def lasts(self, now: float, *, is_busy: bool) -> bool:
        """True when it has lasted too long. To be asked at every sweep. `is_busy`: a payload is on
        its way, or the next message waits for us."""
        spent, self._looked_at = min(now - self._looked_at, 2 * MAX_SECONDS), now
        if is_busy or self._num_heard >= self._num_posted:
            self._seconds = 0.0
        else:
            self._seconds += spent
        return self._seconds >= SILENT_SECONDS
