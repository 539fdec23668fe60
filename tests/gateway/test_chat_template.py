"""Templates render as Hugging Face renders them, and cannot do what they may not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from cluster.errors import ConfigError, InvalidRequest, Unsupported
from gateway.chat_template import ChatTemplate, Message
from gateway.tools.formats import HERMES
from tests.gateway.model_folder import CHAT_TEMPLATE, write_model_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TALK: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi there"},
]


def template(source: str = CHAT_TEMPLATE) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<bos>"})


def test_special_tokens_and_the_generation_prompt_are_written_by_the_template() -> None:
    text = template().render(TALK)
    assert text == "<bos><|system|>Be brief.<|end|><|user|>Hi there<|end|><|assistant|>"


def test_the_generation_prompt_can_be_left_out() -> None:
    assert template().render(TALK, add_generation_prompt=False).endswith("<|end|>")


@pytest.mark.parametrize(
    "source",
    [
        CHAT_TEMPLATE,
        "{%- for m in messages -%}\n  [{{ m['content'] | trim }}]\n{%- endfor %}",
        "{% for m in messages %}{% if loop.index > 5 %}{% break %}{% endif %}{{ m | tojson }}"
        "{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% set ns = namespace(a=1) %}{{ ns.a }}{{ messages[0]['content'].upper() }}",
    ],
)
def test_the_text_equals_hugging_faces(source: str) -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    expected = utilities.render_jinja_template(
        conversations=[TALK],
        chat_template=source,
        add_generation_prompt=True,
        bos_token="<bos>",
    )[0]
    assert template(source).render(TALK) == expected[0]


AS_PARTS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'thinking' %}"
    "{{ '[THINK]' + part.thinking + '[/THINK]' }}{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}|{% endfor %}"
)
AS_FIELD = (
    "{% for m in messages %}{% if m.reasoning_content %}"
    "{{ '[THINK]' + m.reasoning_content + '[/THINK]' }}{% endif %}{{ m.content }}|{% endfor %}"
)


@pytest.mark.parametrize("source", [AS_PARTS, AS_FIELD])
def test_earlier_thoughts_are_written_as_the_template_takes_them(source: str) -> None:
    thought = {"role": "assistant", "content": "Yes", "reasoning_content": "hm"}
    talk = [TALK[1], thought, {**thought, "content": ""}, {"role": "assistant", "content": "No"}]
    written = template(source).render(talk)
    assert written == "Hi there|[THINK]hm[/THINK]Yes|[THINK]hm[/THINK]|No|"
    open_end = template(source).render(
        talk[:2], add_generation_prompt=False, continue_final_message=True
    )
    assert open_end == "Hi there|[THINK]hm[/THINK]Yes"


def test_a_template_of_no_thoughts_gets_words_alone() -> None:
    thought = {"role": "assistant", "content": "Yes", "reasoning_content": "hm"}
    assert "<|assistant|>Yes<|end|>" in template().render([TALK[1], thought])


@pytest.mark.parametrize("content", ["I think", "I think  ", "  and so"])
@pytest.mark.parametrize(
    "source", [CHAT_TEMPLATE, CHAT_TEMPLATE.replace("content", "content|trim")]
)
def test_a_final_message_is_continued_as_hugging_face_does(source: str, content: str) -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    talk: list[Message] = [*TALK, {"role": "assistant", "content": content}]
    expected = utilities.render_jinja_template(
        conversations=[[dict(m) for m in talk]],
        chat_template=source,
        continue_final_message=True,
        bos_token="<bos>",
    )[0]
    text = template(source).render(talk, add_generation_prompt=False, continue_final_message=True)
    assert text == expected[0]


def test_a_refusal_by_the_template_reaches_the_client_in_its_words() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template("{{ raise_exception('roles must alternate') }}").render(TALK)


def test_messages_that_break_the_template_are_the_clients_fault_without_details() -> None:
    with pytest.raises(InvalidRequest) as raised:
        template("{{ messages[0]['content'] + 1 }}").render(TALK)
    assert "str" not in raised.value.message


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    with pytest.raises(Unsupported):
        template("{{ ''.__class__.__mro__[1].__subclasses__() }}").render(TALK)


def test_a_developer_is_the_system_where_the_template_knows_no_developer() -> None:
    talk = [{"role": "developer", "content": "x"}]
    assert "<|system|>x" in template().render(talk)
    knows = CHAT_TEMPLATE + "{# developer #}"
    assert "<|developer|>x" in template(knows).render(talk)


def test_the_jinja_file_comes_before_the_tokenizer_settings(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    (folder / "chat_template.jinja").write_text("from the file")
    found = ChatTemplate.from_folder(folder, {})
    assert found is not None
    assert found.render(TALK) == "from the file"


def _several(folder: Path, templates: dict[str, str]) -> None:
    """In the list of the tokenizer's settings, as Hermes 2 Pro and Hermes 3 come."""
    path = folder / "tokenizer_config.json"
    listed = [{"name": name, "template": source} for name, source in templates.items()]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": listed}))


def _in_files(folder: Path, templates: dict[str, str]) -> None:
    """As newer tools save several."""
    (folder / "additional_chat_templates").mkdir()
    for name, source in templates.items():
        place = folder if name == "default" else folder / "additional_chat_templates"
        file = "chat_template" if name == "default" else name
        (place / f"{file}.jinja").write_text(source)


@pytest.mark.parametrize("write", [_several, _in_files])
def test_a_template_for_tools_is_taken_when_tools_are_offered(
    tmp_path: Path, write: Callable[[Path, dict[str, str]], None]
) -> None:
    folder = write_model_folder(tmp_path)
    for_tools = "{{ tools[0].name }} in <tool_call>{{ bos_token }}{{ messages[0].content }}"
    write(folder, {"default": CHAT_TEMPLATE, "tool_use": for_tools, "rag": "{{ documents }}"})
    found = ChatTemplate.from_folder(folder, {"bos_token": "<bos>"})
    assert found is not None
    assert found.tool_format is HERMES
    assert found.render(TALK, tools=[{"name": "sum"}]) == "sum in <tool_call><bos>Be brief."
    assert found.render(TALK) == template().render(TALK)


# As Llama 3's: a refusal of more than one call, in words of its own.
ONE_CALL = (
    "{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one at once') }}{% endif %}"
    "{{ m.content }}({{ m.tool_calls[0].id }})"
    "{% else %}{{ m.role }}:{{ m.content }} {% endif %}{% endfor %}"
)


def _calling(*ids: str, content: str = "") -> Message:
    function = {"name": "f", "arguments": {}}
    calls = [{"id": one, "type": "function", "function": function} for one in ids]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def _result(call_id: str) -> Message:
    return {"role": "tool", "tool_call_id": call_id, "content": f"of {call_id}"}


def test_several_calls_become_messages_of_one_where_the_template_takes_no_more() -> None:
    talk = [_calling("a", "b", content="So "), _result("b"), _result("x"), _result("a"), *TALK[1:]]
    text = template(ONE_CALL).render(talk)
    assert text == "So (a)tool:of a (b)tool:of b tool:of x user:Hi there "
    assert template(ONE_CALL).render([_calling("a"), _result("a")]) == "(a)tool:of a "


def test_several_calls_stay_one_message_where_the_template_takes_them() -> None:
    source = "{% for m in messages %}{{ m.tool_calls | length if m.tool_calls }}{% endfor %}"
    assert template(source).render([_calling("a", "b"), _result("a"), _result("b")]) == "2"


def test_a_model_without_template_has_none(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(write_model_folder(tmp_path, chat_template=None), {}) is None


def test_a_broken_template_stops_the_start() -> None:
    with pytest.raises(ConfigError):
        template("{% if %}")
