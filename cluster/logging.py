"""Log lines: for people on a terminal, JSON elsewhere, always with the ids in force.

1. `setup_logging` routes the standard library's records through structlog, once per process.
2. A module logs as usual: `logger = logging.getLogger(__name__)`, lazy `%` arguments.
3. `log_context(request_id=...)` binds ids to the current task; every line inside carries them.

Facts for machines go into `extra`: `logger.info("request done", extra={"status": 200})`.
Values under secret-looking keys, credentials inside URLs and bearer tokens never reach the
output, wherever in the line they stand. Whatever a client chose stays text, and short: paths, names
of fields and models are on lines, too, and must neither steer a terminal nor fill a disk.
"""

from __future__ import annotations

import logging
import re
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import structlog

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableMapping

LOG_LEVELS = ("debug", "info", "warning", "error")
_AS_JSON = {"auto": None, "console": False, "json": True}

_REDACTED = "[redacted]"
MAX_VALUE_CHARS = 1000  # of a fact; the text of a line and its traceback are ours
_OURS = ("event", "exception", "stack")
# What steers a terminal, or is the end of a line for who reads one. A newline and a tab are left:
# tracebacks have them, and both forms quote those of a fact.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_SECRET_KEY = re.compile(
    r"(?:^|[_-])(?:password|passwd|secret|authorization|cookie|api[_-]?keys?|auth[_-]?token"
    r"|admin[_-]?token|credentials?|private[_-]?key)$",
    re.IGNORECASE,
)
_SECRET_TEXT = re.compile(
    # scheme://user:password@. Bounded: of a long "a.a.a." each "a" could begin a scheme.
    r"(?P<before>\b[a-z][a-z0-9+.-]{0,30}://[^\s/:@]*:)[^\s/]+(?=@)"
    r"|(?P<query>[?&]password=)[^\s&\"',]+"  # of Redis, where a URL can say it so
    r"|(?P<bearer>\bbearer\s+)[^\s\"',]+"
    r"|\b(?P<kind>pk|sk)[_-][A-Za-z0-9][A-Za-z0-9_-]{15,}",  # API keys as we and others mint them
    re.IGNORECASE,
)


def setup_logging(
    level: str = "info",
    *,
    log_format: str = "auto",
    stream: TextIO | None = None,
    **context: object,
) -> None:
    """Send all records to `stream` (standard error), replacing earlier set-ups.

    `log_format` "auto" means: JSON unless the stream is a terminal. `context` (role, node_id) is
    put on every JSON line of the process; who reads a terminal sees which program speaks.
    Raises `ConfigError` for an unknown level.
    """
    if level.lower() not in LOG_LEVELS:
        raise ConfigError(f"must be one of {', '.join(LOG_LEVELS)}", param="log_level")
    stream = sys.stderr if stream is None else stream
    chosen = _AS_JSON[log_format]
    as_json = not stream.isatty() if chosen is None else chosen
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        _formatter(as_json=as_json, colors=not as_json and stream.isatty(), context=context)
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    # Libraries speak only when something is wrong, unless everything is asked for.
    library_level = logging.DEBUG if level.lower() == "debug" else logging.WARNING
    for name in ("asyncio", "grpc", "httpx", "redis", "urllib3", "filelock"):
        logging.getLogger(name).setLevel(library_level)


@contextmanager
def log_context(**ids: object) -> Iterator[None]:
    """Put `request_id`, `node_id` and the like on every line of this task until exit."""
    with structlog.contextvars.bound_contextvars(**ids):
        yield


def redact(text: str) -> str:
    """`text` without URL passwords, bearer tokens and API keys."""
    return _SECRET_TEXT.sub(_redact_match, text)


def _redact_match(match: re.Match[str]) -> str:
    return (match["before"] or match["query"] or match["bearer"] or "") + _REDACTED


def _formatter(
    *, as_json: bool, colors: bool, context: dict[str, object]
) -> structlog.stdlib.ProcessorFormatter:
    def add_context(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        for key, value in context.items():
            event.setdefault(key, value)
        return event

    gather: list[Any] = [
        structlog.stdlib.ExtraAdder(),
        structlog.contextvars.merge_contextvars,
        add_context if as_json else _without_none,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
    ]
    render: list[Any] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        # Before redaction, so that a traceback is redacted too.
        structlog.processors.format_exc_info,
        _redact_event,
    ]
    if as_json:
        render += [
            _lead_with("ts", "level", "event"),
            structlog.processors.JSONRenderer(default=str, ensure_ascii=False),
        ]
    else:
        plain = structlog.dev.plain_traceback
        render.append(
            structlog.dev.ConsoleRenderer(
                colors=colors, timestamp_key="ts", pad_event_to=0, exception_formatter=plain
            )
        )
    return structlog.stdlib.ProcessorFormatter(foreign_pre_chain=gather, processors=render)


def _without_none(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {key: value for key, value in event.items() if value is not None}


def _lead_with(*keys: str) -> Any:
    def reorder(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        first = {key: event[key] for key in keys if key in event}
        return first | {key: value for key, value in event.items() if key not in first}

    return reorder


def _redact_event(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        value = _redact_value(key, value)
        if isinstance(value, str):
            value = plain(value if key in _OURS else _short(value))
        event[key] = value
    return event


def plain(text: str) -> str:
    """`text` with what steers a terminal escaped; its newlines and tabs stay."""
    if text.isprintable():
        return text
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def _short(text: str) -> str:
    if len(text) <= MAX_VALUE_CHARS:
        return text
    return f"{text[:MAX_VALUE_CHARS]}... ({len(text)} characters)"


def _redact_value(key: str, value: Any) -> Any:
    if _SECRET_KEY.search(key) and value not in (None, ""):
        return _REDACTED
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {k: _redact_value(str(k), v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redact_value("", item) for item in value]
    return value
