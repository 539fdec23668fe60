"""Time as an argument: a `Clock` gives monotonic seconds, never the wall's.

Instants are meaningful inside one process only. What crosses a wire is a duration.
"""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]

monotonic: Clock = time.monotonic
