"""What the machine of an outgoing transfer tells its shell to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.errors import ServingError


@dataclass(frozen=True, slots=True)
class SendCommit:
    num_frames: int
    first_token_id: int


@dataclass(frozen=True, slots=True)
class SendAbort:
    """`error` None: the KV is not needed any more, nobody failed."""

    num_frames_posted: int
    error: ServingError | None


@dataclass(frozen=True, slots=True)
class SendAbortAck:
    epoch: int
    num_frames_posted: int


@dataclass(frozen=True, slots=True)
class ReportCommitted:
    pass


@dataclass(frozen=True, slots=True)
class ReportFailed:
    error: ServingError


@dataclass(frozen=True, slots=True)
class FreeSources:
    pass
