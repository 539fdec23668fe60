"""Messages to prompt text, by the template that came with the model.

1. `ChatTemplate.from_folder` finds and compiles the template at start, and the one for
   conversations with tools where the model has one of its own for them (`template_files.py`).
2. `render` applies it to one conversation.

The environment is Hugging Face's: trimmed blocks, loop controls, `tojson`, `strftime_now`,
`raise_exception` and the `generation` block. It is sandboxed, and templates come from the
model's folder alone: a client cannot send one.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.errors import ConfigError, InvalidRequest, Unsupported
from gateway.earlier_thoughts import take_parts, with_part
from gateway.template_files import DEFAULT, TOOL_USE, template_sources
from gateway.thoughts import thought_marks_of
from gateway.tools.formats import format_of
from gateway.tools.one_call import one_call_each, takes_one_call

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from jinja2.parser import Parser

Message = dict[str, Any]
_MAX_PROBLEM_CHARS = 200
# What templates run into with values that they were not written for.
_MISFITS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
# Marks the end of a message that is to be continued. Ends in a space to reveal trimming.
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class RefusedByTemplate(Exception):
    """The template itself says that these messages do not fit (`raise_exception`)."""


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; for serving it is its body."""

    tags = {"generation"}  # noqa: RUF012 (the name and type are jinja2's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class ChatTemplate:
    def __init__(
        self, source: str, special_tokens: Mapping[str, Any], *, tool_use: str | None = None
    ) -> None:
        """`tool_use`: the source of the template that is taken when tools are offered."""
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise ConfigError(f"The chat template is not valid: {error}", param="model") from error
        self._special_tokens = dict(special_tokens)
        self._knows_developer = "developer" in source
        self._with_tools = None if tool_use is None else ChatTemplate(tool_use, special_tokens)
        self.tool_format = format_of(source if tool_use is None else tool_use)
        self.thought_marks = thought_marks_of(source)
        self._takes_one_call = self._takes_parts = False  # until it is tried
        self._takes_one_call = takes_one_call(self.render)
        self._takes_parts = take_parts(self.render, self.thought_marks)

    @classmethod
    def from_folder(cls, folder: Path, special_tokens: Mapping[str, Any]) -> ChatTemplate | None:
        """None when the model has no template."""
        sources = template_sources(folder)
        if DEFAULT not in sources:
            return None
        return cls(sources[DEFAULT], special_tokens, tool_use=sources.get(TOOL_USE))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """`variables` that the template does not read have no effect.

        Raises `InvalidRequest` when the messages do not fit the template.
        """
        if tools and self._with_tools is not None:
            return self._with_tools.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=variables,
                tools=tools,
            )
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other.",
                param="continue_final_message",
            )
        known = self._with_known_roles(messages)
        if self._takes_one_call:
            known = list(one_call_each(known))
        if continue_final_message:
            known[-1] = {**known[-1], "content": known[-1]["content"] + _TAG}
        if self._takes_parts:
            known = [with_part(message) for message in known]
        context: dict[str, Any] = {
            "tools": list(tools) or None,
            "documents": None,
            **self._special_tokens,
        }
        context.update(variables or {})
        context["messages"] = known
        context["add_generation_prompt"] = add_generation_prompt
        text = self._render(context)
        return _cut_at_tag(text) if continue_final_message else text

    def _render(self, context: dict[str, Any]) -> str:
        try:
            return self._template.render(context)
        except RefusedByTemplate as error:
            raise InvalidRequest(str(error)[:_MAX_PROBLEM_CHARS], param="messages") from error
        except SecurityError as error:
            raise Unsupported(
                "The model's chat template asks for something it may not have.", param="messages"
            ) from error
        except (TemplateError, *_MISFITS) as error:
            raise InvalidRequest(
                "The messages do not fit the model's chat template.", param="messages"
            ) from error

    def _with_known_roles(self, messages: Sequence[Message]) -> list[Message]:
        """A template that never heard of developers takes them for the system."""
        if self._knows_developer:
            return list(messages)
        return [
            {**message, "role": "system"} if message["role"] == "developer" else message
            for message in messages
        ]


def _cut_at_tag(text: str) -> str:
    """End right after the last message's content, so that the model goes on with it."""
    end = text.rfind(_TAG.rstrip())
    if end < 0:
        raise InvalidRequest(
            "The final message cannot be continued: the chat template leaves it out.",
            param="continue_final_message",
        )
    # A template that trims contents has trimmed the space after the tag too.
    return text[:end] if text.startswith(_TAG, end) else text[:end].rstrip()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> NoReturn:
    raise RefusedByTemplate(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
