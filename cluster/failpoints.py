"""Places where a test may make a process fail, in the middle of what it does.

Life of a failpoint
    1. Code names the place: `failpoint("prefill.before_commit")`. Nothing is armed, and all that
       happens is the look into an empty dictionary.
    2. A test starts the program with BATON_FAILPOINTS, and `arm` reads it once:

           prefill.before_commit=exit ; decode.on_frame=sleep:0.5#3 ; prefill.after_frame=stop@FILE

       that is NAME=ACTION[:SECONDS][#HIT][@FILE], one for each NAME. With HIT it fires at that
       hit alone (the first is 1), else at each. With FILE it fires only for the process that
       removes this file: one shot, however many processes have the same failpoint and however
       often they start again; a test loads it when it wants, and sees the file go.
    3. Each shot says so on standard error before it acts.

Actions: `sleep` blocks the thread, `raise` raises `FailpointError`, `exit` ends the process at
once with `EXIT_CODE` and without any clean-up, `stop` sends it SIGSTOP.
"""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from cluster.errors import ConfigError, ServingError

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = "BATON_FAILPOINTS"
EXIT_CODE = 86
NAMES = frozenset(
    {
        "prefill.after_chunk",  # the KV of a chunk is computed and queued for sending
        "prefill.after_frame",  # a frame was posted
        "prefill.before_commit",  # the first token is sampled, the commit not sent
        "prefill.after_commit",  # the decode node has answered that it has all
        "decode.on_frame",  # a header came, its payload was not received yet
        "decode.before_start",  # all is verified, the sequence does not run yet
    }
)
_PATTERN = re.compile(
    r"(?P<name>[a-z_.]+)=(?P<action>[a-z]+)"
    r"(:(?P<seconds>[0-9.]+))?(#(?P<hit>[0-9]+))?(@(?P<file>.+))?"
)


class FailpointError(ServingError):
    """What a failpoint raises."""


class Action(Enum):
    SLEEP = "sleep"
    RAISE = "raise"
    EXIT = "exit"
    STOP = "stop"


@dataclass(slots=True)
class Armed:
    """One armed failpoint. `num_hits` counts how often the place was reached."""

    name: str
    action: Action
    seconds: float = 0.0
    hit: int | None = None
    file: str | None = None
    num_hits: int = 0

    def reached(self) -> None:
        self.num_hits += 1
        if (self.hit is None or self.hit == self.num_hits) and self._take_shot():
            self._fire()

    def _take_shot(self) -> bool:
        if self.file is None:
            return True
        try:
            os.unlink(self.file)
        except FileNotFoundError:
            return False
        return True

    def _fire(self) -> None:
        os.write(2, f"failpoint {self.name}: {self.action.value} (pid {os.getpid()})\n".encode())
        match self.action:
            case Action.SLEEP:
                time.sleep(self.seconds)
            case Action.RAISE:
                raise FailpointError(f"The failpoint {self.name} was armed.", reason="failpoint")
            case Action.EXIT:
                os._exit(EXIT_CODE)
            case Action.STOP:
                os.kill(os.getpid(), signal.SIGSTOP)


_armed: dict[str, Armed] = {}


def failpoint(name: str) -> None:
    """The process is at this place, one of `NAMES`."""
    if _armed and name in _armed:
        _armed[name].reached()


def arm(env: Mapping[str, str]) -> None:
    """Arm what BATON_FAILPOINTS says, and nothing else. Raises `ConfigError` when it is wrong."""
    _armed.clear()
    _armed.update((armed.name, armed) for armed in parse(env.get(VARIABLE, "")))


def armed_names() -> frozenset[str]:
    return frozenset(_armed)


def parse(text: str) -> list[Armed]:
    """The failpoints of a text as in BATON_FAILPOINTS. Raises `ConfigError`."""
    found = [_parse_one(part.strip()) for part in text.split(";") if part.strip()]
    if len({each.name for each in found}) != len(found):
        raise ConfigError(f"{VARIABLE} names a failpoint twice.")
    return found


def _parse_one(text: str) -> Armed:
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ConfigError(f"{VARIABLE}: {text!r} is not NAME=ACTION[:SECONDS][#HIT][@FILE].")
    if match["name"] not in NAMES:
        raise ConfigError(f"{VARIABLE}: there is no failpoint {match['name']!r}.")
    try:
        action = Action(match["action"])
        seconds = float(match["seconds"] or 0)
    except ValueError:
        raise ConfigError(f"{VARIABLE}: {text!r} has no such action or seconds.") from None
    if (action is Action.SLEEP) is not (match["seconds"] is not None):
        raise ConfigError(f"{VARIABLE}: seconds belong to sleep, and sleep needs them.")
    hit = int(match["hit"]) if match["hit"] else None
    if hit == 0:
        raise ConfigError(f"{VARIABLE}: the first hit is 1.")
    return Armed(match["name"], action, seconds, hit, match["file"])
