"""What an operator may change while the gateway runs. A request reads it once, at its start."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.errors import InvalidRequest
from cluster.request import KVLoadFailurePolicy

MAX_STREAM_INTERVAL = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Raises `InvalidRequest` naming the field that is out of range."""

    local_prefill_tokens: int = 0
    stream_interval: int = 1
    kv_load_failure_policy: KVLoadFailurePolicy = KVLoadFailurePolicy.FAIL
    stream_recovery: bool = False

    def __post_init__(self) -> None:
        if self.local_prefill_tokens < 0:
            raise InvalidRequest(
                "local_prefill_tokens must not be negative.", param="local_prefill_tokens"
            )
        if not 1 <= self.stream_interval <= MAX_STREAM_INTERVAL:
            raise InvalidRequest(
                f"stream_interval must be in [1, {MAX_STREAM_INTERVAL}].", param="stream_interval"
            )

    def for_request(self, kv_load_failure_policy: KVLoadFailurePolicy | None) -> Policy:
        """With what the request's client has chosen; None: nothing."""
        if kv_load_failure_policy is None:
            return self
        return replace(self, kv_load_failure_policy=kv_load_failure_policy)


class PolicyHolder:
    """The policy in force. `change` replaces it at once, or not at all."""

    def __init__(self, policy: Policy) -> None:
        self.current = policy

    def change(self, **changes: object) -> Policy:
        self.current = replace(self.current, **changes)  # type: ignore[arg-type]
        return self.current
