from __future__ import annotations

import asyncio
import io
import json
import logging
from typing import TYPE_CHECKING, Any

import pytest

from cluster.errors import ConfigError
from cluster.logging import MAX_VALUE_CHARS, log_context, redact, setup_logging

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("tests.cluster")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_off_a_terminal_every_line_is_json_with_the_ids_in_force() -> None:
    stream = io.StringIO()
    setup_logging(stream=stream, role="decode", node_id="d0")
    with log_context(request_id="r1"):
        logger.info("done in %d steps", 3, extra={"status": 200})
    logger.warning("after")
    first, second = lines(stream)
    assert first["event"] == "done in 3 steps"
    assert first["level"] == "info"
    assert first["status"] == 200
    assert (first["request_id"], first["role"], first["node_id"]) == ("r1", "decode", "d0")
    assert first["logger"] == "tests.cluster"
    assert first["ts"].endswith("Z")
    assert list(first)[:3] == ["ts", "level", "event"]
    assert "request_id" not in second


def test_tasks_do_not_see_each_others_ids() -> None:
    stream = io.StringIO()
    setup_logging(stream=stream)

    async def work(name: str, entered: asyncio.Event, other: asyncio.Event) -> None:
        with log_context(request_id=name):
            entered.set()
            await other.wait()
            logger.info(name)

    async def both() -> None:
        a, b = asyncio.Event(), asyncio.Event()
        await asyncio.gather(work("a", a, b), work("b", b, a))

    asyncio.run(both())
    assert [(line["event"], line["request_id"]) for line in lines(stream)] in (
        [("a", "a"), ("b", "b")],
        [("b", "b"), ("a", "a")],
    )


def test_on_a_terminal_lines_are_for_people() -> None:
    stream = Terminal()
    setup_logging(stream=stream)
    logger.info("hello", extra={"error": None, "status": 200})
    assert "hello" in stream.getvalue()
    assert "error" not in stream.getvalue(), "what there is none of is no news"
    assert not stream.getvalue().startswith("{")


def test_levels_are_obeyed_and_libraries_are_quieter() -> None:
    stream = io.StringIO()
    setup_logging("info", stream=stream)
    logger.debug("no")
    logging.getLogger("redis").info("no")
    logging.getLogger("redis").warning("yes")
    assert [line["event"] for line in lines(stream)] == ["yes"]
    with pytest.raises(ConfigError, match="must be one of"):
        setup_logging("loud", stream=stream)


def test_setting_up_twice_does_not_double_lines() -> None:
    stream = io.StringIO()
    setup_logging(stream=stream)
    setup_logging(stream=stream)
    logger.info("once")
    assert len(lines(stream)) == 1


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_secrets_never_reach_the_output(stream: io.StringIO) -> None:
    setup_logging(stream=stream)
    try:
        raise RuntimeError("redis://user:canary1@host failed")
    except RuntimeError:
        logger.exception("at redis://:canary2@host/0", extra={"api_key": "canary3"})
    logger.info("header %s", "Authorization: Bearer canary4.x-y")
    logger.info("x", extra={"headers": {"authorization": "canary5"}, "urls": ["a://b:canary6@c"]})
    logger.info("key pk_abc_canary7canary7canary7")
    logger.info("at unix:///redis.sock?db=0&password=canary8 and redis://:a@canary9@host/0")
    text = stream.getvalue()
    assert "canary" not in text
    assert "redis://user:" in text


def test_counts_of_tokens_are_no_secret() -> None:
    stream = io.StringIO()
    setup_logging(stream=stream)
    logger.info("done", extra={"prompt_tokens": 5, "token_ids": [1], "max_tokens": 3})
    assert lines(stream)[0]["prompt_tokens"] == 5
    assert lines(stream)[0]["token_ids"] == [1]
    assert redact("http://host:80/path and 3 tokens") == "http://host:80/path and 3 tokens"


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_what_a_client_named_cannot_steer_a_terminal_or_forge_a_line(log_format: str) -> None:
    stream = io.StringIO()
    setup_logging(stream=stream, log_format=log_format)
    evil = "\x1b[2J\x9b31m\u2028\u202e\x7f\r\nforged"
    logger.info("request refused", extra={"param": evil})
    logger.info("it is called %s", evil.partition("\r")[0])
    text = stream.getvalue()
    assert not set(text) & set("\x1b\x9b\u2028\u202e\x7f\r")
    assert not any(line.startswith("forged") for line in text.splitlines())
    assert "[2J" in text


@pytest.mark.timeout(20)  # to look for secrets in it takes minutes where that grows as its square
def test_what_a_client_named_is_shortened_and_quickly_searched_for_secrets() -> None:
    stream = io.StringIO()
    setup_logging(stream=stream)
    name = "a." * 200_000
    logger.info("request refused", extra={"param": name})
    told = lines(stream)[0]["param"]
    assert told == f"{name[:MAX_VALUE_CHARS]}... (400000 characters)"
    assert redact(name) == name
