"""Tools of a chat: what the model is told, and what becomes of what it says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from cluster.errors import InvalidRequest
from gateway.schemas import MessageBody
from gateway.tools.bodies import earlier_calls, offered_tools
from gateway.tools.formats import HERMES, LLAMA, MISTRAL, ToolFormat, format_of
from gateway.tools.parser import MAX_PASSED, ToolParser
from tests.gateway.model_folder import CHAT_TEMPLATE, write_model_folder
from tests.gateway.running_gateway import RunningGateway
from tests.gateway.test_http_edge import MODEL, error_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}
]
CALL = '<tool_call>\n{"name": "sum", "arguments": {"a": 1}}\n</tool_call>'
CUT = 'no "JSON'
LLAMA_CALL = '{"name": "f", "parameters": {}}'
# The node echoes the prompt, so that a user can write what the model is to say.
TEMPLATE = (
    "{# <tool_call> #}{% if tools %}{{ 'T' * tools | length }}{% endif %}"
    "{% for message in messages %}"
    "{% for call in message.tool_calls or [] %}({{ call.function.arguments.a }}){% endfor %}"
    "{% if message.name %}{{ message.name }}:{% endif %}"
    "<|{{ 'user' if message.role == 'tool' else message.role }}|>{{ message.content }}<|end|>"
    "{% endfor %}"
)


def call_with(text: str, num_calls: int = 1) -> str:
    return f'<tool_call>{{"name": "f", "arguments": {{"a": "{text}"}}}}</tool_call>' * num_calls


def parsed(form: ToolFormat, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolParser(form)
    found = [*(parser.push(piece) for piece in pieces), parser.flush()]
    calls = [(call.name, call.arguments) for each in found for call in each.calls]
    assert parser.num_calls == len(calls)
    return "".join(each.content for each in found), calls


@pytest.mark.parametrize(
    ("form", "text", "content", "names"),
    [
        (HERMES, f"Let me see. {CALL}", "Let me see. ", ["sum"]),
        (HERMES, f"{CALL}\n{CALL}", "", ["sum", "sum"]),
        (HERMES, f"1 {CALL} 2 \n3 {CALL}\n{CALL}\n", "1  2 \n3 ", ["sum", "sum", "sum"]),
        (HERMES, "1 < 2, <tool> and <tool_ca", "1 < 2, <tool> and <tool_ca", []),
        (HERMES, "<tool_call>{no json}</tool_call>", "<tool_call>{no json}</tool_call>", []),
        (HERMES, '<tool_call>{"name": "cut', '<tool_call>{"name": "cut', []),
        (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", ["f"]),
        (HERMES, CALL.removesuffix("</tool_call>"), "", ["sum"]),
        (HERMES, '<tool_call>{"name": 5}</tool_call>!', '<tool_call>{"name": 5}</tool_call>!', []),
        (HERMES, f" {CALL}", "", ["sum"]),
        (HERMES, " \n", " \n", []),
        (HERMES, call_with("</tool_call>") + " So", " So", ["f"]),
        (HERMES, call_with(r"\"</tool_call>") + CALL, "", ["f", "sum"]),
        (HERMES, call_with(r"\\", 2) + CALL, "", ["f", "f", "sum"]),
        (HERMES, call_with("<tool_call></tool_call>", 2), "", ["f", "f"]),
        (HERMES, call_with("</tool_call>").removesuffix("</tool_call>"), "", ["f"]),
        (HERMES, f'{call_with(CUT)} "so" {CALL}', f'{call_with(CUT)} "so" ', ["sum"]),
        (HERMES, f"{call_with(CUT)} so {CALL}", f"{call_with(CUT)} so ", ["sum"]),
        (HERMES, f"{call_with(CUT)} so", f"{call_with(CUT)} so", []),
        (MISTRAL, 'A[TOOL_CALLS] [{"name": "f", "arguments": {}}]', "A", ["f"]),
        (MISTRAL, "[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
        (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {}}]\nSo', "\nSo", ["f"]),
        (MISTRAL, "A[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[ARGS]{}", "A", ["f", "g"]),
        (MISTRAL, '[TOOL_CALLS]f[CALL_ID]a1b2c3d4e[ARGS]{"a": "[TOOL_CALLS]g{}"}', "", ["f"]),
        (MISTRAL, '[TOOL_CALLS]f{} and g{"a": 1}', ' and g{"a": 1}', ["f"]),
        (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a', '[TOOL_CALLS]f[ARGS]{"a', []),
        (MISTRAL, '[TOOL_CALLS]see {"a": 1}', '[TOOL_CALLS]see {"a": 1}', []),
        (LLAMA, '{"name": "f", "parameters": {}}; {"name": "g", "arguments": {}}', "", ["f", "g"]),
        (LLAMA, '{"name": "f", "parameters": {}} I used {f}', " I used {f}", ["f"]),
        (LLAMA, f"{LLAMA_CALL}; ", "", ["f"]),
        (LLAMA, f'{LLAMA_CALL}; {{"name": "cut', '; {"name": "cut', ["f"]),
        (LLAMA, f" <|python_tag|>\n{LLAMA_CALL}", "", ["f"]),
        (LLAMA, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        (LLAMA, "<|python_", "<|python_", []),
        (LLAMA, '<|python_tag|>{"a": 1}', '<|python_tag|>{"a": 1}', []),
        (LLAMA, f"See {LLAMA_CALL}", f"See {LLAMA_CALL}", []),
        (LLAMA, f"See <|python_tag|>{LLAMA_CALL}", "See ", ["f"]),
        (LLAMA, "See <|python_tag|>print(1)", "See <|python_tag|>print(1)", []),
        (LLAMA, '{"name": "Ada", "born": 1815}', '{"name": "Ada", "born": 1815}', []),
        (LLAMA, '{"a": 1}', '{"a": 1}', []),
        (LLAMA, "  plain", "  plain", []),
    ],
)
def test_text_becomes_calls_wherever_it_is_cut(
    form: ToolFormat, text: str, content: str, names: list[str]
) -> None:
    for at in range(len(text) + 1):
        said, calls = parsed(form, [text[:at], text[at:]])
        assert (said, [name for name, _ in calls]) == (content, names)
    said, calls = parsed(form, list(text))
    assert (said, [name for name, _ in calls]) == (content, names)


def test_no_more_than_some_closing_marks_are_passed_in_search_of_the_end_of_a_call() -> None:
    """Behind each the rest is looked at once more: of all that a model can be made to write that
    would stop the gateway for minutes."""
    written = '<tool_call>"</tool_call>"'
    parser = ToolParser(HERMES)
    assert parser.push(written * MAX_PASSED).content == ""
    assert parser.push(written).content == written


@pytest.mark.parametrize(
    "body",
    [
        "[" * 100_000,
        '{"name": "f", "arguments": {"a": ' + "[" * 100 + "]" * 100 + "}}",
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}",
        '{"name": "f", "arguments": {"a": 1e999}}',
        '{"name": "f", "arguments": "text"}',
        '{"name": "f", "arguments": {"a": "\\ud83d"}}',
        '{"name": "f\\ud83d", "arguments": {}}',
    ],
    ids=[
        "noise",
        "deep",
        "no number",
        "nor this",
        "no end",
        "no object",
        "half a character",
        "half a name",
    ],
)
def test_what_no_client_could_read_as_a_call_is_content(body: str) -> None:
    """A prompt can make a model write anything."""
    text = f"<tool_call>{body}</tool_call>"
    assert parsed(HERMES, [text]) == (text, [])


def test_arguments_are_json_with_their_letters() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"city": "Köln", "n": [1, 2]}}</tool_call>'
    assert json.loads(parsed(HERMES, [text])[1][0][1]) == {"city": "Köln", "n": [1, 2]}


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "f", "parameters": {"a": "x\\ny"}}',
        '{"name": "f", "arguments": {"a": "x\ny"}}',
        '{"name": "f", "arguments": "{\\"a\\": \\"x\\\\ny\\"}"}',
    ],
    ids=["the other word", "a line break as it is", "an object in a text"],
)
def test_arguments_are_read_as_models_happen_to_write_them(body: str) -> None:
    assert parsed(HERMES, [f"<tool_call>{body}</tool_call>"]) == ("", [("f", '{"a": "x\\ny"}')])


def test_calls_by_name_bring_their_arguments() -> None:
    text = '[TOOL_CALLS]f[ARGS]{"city": "Köln"}[TOOL_CALLS]g[CALL_ID]000000001[ARGS]{"n": [1]}'
    assert parsed(MISTRAL, [text])[1] == [("f", '{"city": "Köln"}'), ("g", '{"n": [1]}')]


def test_a_template_tells_the_form_that_it_teaches() -> None:
    assert format_of("{% if tools %}<tool_call>{% endif %}") is HERMES
    assert format_of("{{ tools }}[TOOL_CALLS]") is MISTRAL
    assert format_of("""{{ tools }}'{"name": ..., "parameters": ...}'""") is LLAMA
    assert format_of("{{ tools }}<tool_call><function=f>") is None
    assert format_of("{{ tools }}<tool_call>f<arg_key>a</arg_key>") is None
    assert format_of("{{ tools }}") is None
    assert format_of("<tool_call>") is None
    assert format_of(CHAT_TEMPLATE) is None


@pytest.fixture(scope="module")
def tool_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = write_model_folder(tmp_path_factory.mktemp("tools"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    running = RunningGateway(folder)
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client:
        yield client
    running.close()


@pytest.mark.parametrize(
    ("marks", "taught", "said"),
    [
        (["<tool_call>", "</tool_call>"], "<tool_call>", CALL),
        (["[TOOL_CALLS]", "[ARGS]"], "[TOOL_CALLS]", '[TOOL_CALLS]sum[ARGS]{"a": 1}'),
        (
            ["<|python_tag|>"],
            '"parameters"',
            'See <|python_tag|>{"name": "sum", "parameters": {"a": 1}}',
        ),
    ],
)
def test_marks_that_are_special_tokens_are_seen(
    tmp_path: Path, marks: list[str], taught: str, said: str
) -> None:
    folder = write_model_folder(tmp_path, special=marks)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<tool_call>", taught))
    running = RunningGateway(folder)
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client:
        (choice,) = ask(client, said).choices
    running.close()
    assert [call.function.arguments for call in choice.message.tool_calls] == ['{"a": 1}']


def ask(client: openai.OpenAI, content: str = CALL, **changes: Any) -> Any:
    options = {"tools": TOOLS, **changes}
    talk: Any = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=MODEL, messages=talk, **options)


def test_a_call_is_read_by_the_client(tool_client: openai.OpenAI) -> None:
    (choice,) = ask(tool_client).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "T", "that a tool was offered reached the template"
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == (
        "function",
        "sum",
        '{"a": 1}',
    )


def test_an_agent_may_bring_hundreds_of_tools(tool_client: openai.OpenAI) -> None:
    (choice,) = ask(tool_client, "x", tools=TOOLS * 150).choices
    assert choice.message.content == "T" * 150 + "x"


def test_a_streamed_call_begins_with_its_name_and_says_it_once(tool_client: openai.OpenAI) -> None:
    chunks = [chunk.choices[0] for chunk in ask(tool_client, CALL + CALL, stream=True)]
    assert chunks[-1].finish_reason == "tool_calls"
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "T"
    deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert [delta.index for delta in deltas] == [0, 0, 1, 1]
    for opening, rest in (deltas[:2], deltas[2:]):
        assert (opening.type, opening.function.name, opening.function.arguments) == (
            "function",
            "sum",
            "",
        )
        assert opening.id
        assert (rest.id, rest.function.name, rest.function.arguments) == (None, None, '{"a": 1}')


def test_one_call_ends_the_answer_where_more_may_not_be(tool_client: openai.OpenAI) -> None:
    for stream in (False, True):
        answer = ask(tool_client, CALL + CALL, parallel_tool_calls=False, stream=stream)
        if stream:
            choices = [chunk.choices[0] for chunk in answer]
            calls = [call for choice in choices for call in choice.delta.tool_calls or []]
            assert len(calls) == 2, "its name, its arguments"
            reason = choices[-1].finish_reason
        else:
            assert len(answer.choices[0].message.tool_calls) == 1
            reason = answer.choices[0].finish_reason
        assert reason == "tool_calls"


def test_a_call_that_is_cut_short_stays_text(tool_client: openai.OpenAI) -> None:
    (choice,) = ask(tool_client, max_tokens=12).choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert "<tool_call>" in choice.message.content


def test_without_tools_the_same_words_are_content(tool_client: openai.OpenAI) -> None:
    for changes in ({"tools": openai.NOT_GIVEN}, {"tool_choice": "none"}):
        (choice,) = ask(tool_client, **changes).choices
        assert (choice.message.content, choice.finish_reason) == (CALL, "stop")


def test_results_of_calls_go_back_to_the_template(tool_client: openai.OpenAI) -> None:
    (asked,) = ask(tool_client).choices
    call_id = asked.message.tool_calls[0].id
    talk: Any = [asked.message, {"role": "tool", "tool_call_id": call_id, "content": "two"}]
    talk[0].content = None
    again = tool_client.chat.completions.create(model=MODEL, messages=talk)
    assert again.choices[0].message.content == "(1)sum:two"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": TOOLS * 1025}, "tools"),
        ({"tools": [{"type": "web"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
            "tools[0].function.strict",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": 0}}]},
            "tools[0].function.strict",
        ),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_what_tools_cannot_be_is_named(
    tool_client: openai.OpenAI, changes: dict[str, Any], param: str
) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], **changes}
    refused = httpx.post(f"{tool_client.base_url}chat/completions", json=body, timeout=20)
    assert (refused.status_code, error_of(refused)["param"]) == (400, param)


def test_a_template_finds_what_a_client_may_leave_out_of_a_tool() -> None:
    empty = {"type": "object", "properties": {}}
    for left_out in ({}, {"description": None, "parameters": None}):
        tool = {"type": "function", "function": {"name": "f", **left_out}}
        (offered,) = offered_tools([tool], "auto")
        assert offered["function"] == {"name": "f", "description": "", "parameters": empty}
    said = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    (offered,) = offered_tools([{"type": "function", "function": said}], "auto")
    assert offered["function"] == said


@pytest.mark.parametrize(
    "changes",
    [{"tools": TOOLS}, {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}],
)
def test_a_template_without_tools_refuses_them(http: httpx.Client, changes: dict[str, Any]) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], **changes}
    refused = http.post("/v1/chat/completions", json=body)
    assert (refused.status_code, error_of(refused)["code"]) == (400, "unsupported")


@pytest.mark.parametrize(
    "arguments", ["[" * 100_000, "[" * 100 + "]" * 100, '{"a": "\\ud83d"}', '{"\\ud83d": 1}']
)
def test_an_earlier_call_whose_arguments_fit_no_prompt_is_refused(arguments: str) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    message = MessageBody(role="assistant", tool_calls=[call])
    with pytest.raises(InvalidRequest, match="JSON"):
        earlier_calls(message, "messages[0]")
