"""The chat templates of a model folder, by name, as Hugging Face lays them down.

1. `chat_template.jinja` is the one named `default`; others lie in `additional_chat_templates/`.
2. Where there is no such file, `chat_template` of `tokenizer_config.json`: one text, or a list
   of names and texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.tokenizer import read_json

if TYPE_CHECKING:
    from pathlib import Path

DEFAULT = "default"
TOOL_USE = "tool_use"  # for conversations with tools, where a model has one of its own for them


def template_sources(folder: Path) -> dict[str, str]:
    files = {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").is_file():
        files[DEFAULT] = folder / "chat_template.jinja"
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    return _named(read_json(folder / "tokenizer_config.json").get("chat_template"))


def _named(value: object) -> dict[str, str]:
    if isinstance(value, str):
        return {DEFAULT: value}
    entries = value if isinstance(value, list) else []
    named = {entry.get("name"): entry.get("template") for entry in entries}
    return {name: source for name, source in named.items() if isinstance(source, str)}
