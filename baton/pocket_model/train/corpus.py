# ruff: noqa: SIM905 (long word lists read better as text)
"""The training text: what the running interpreter's standard library says about itself.

Life of a document:

1. `library_sources` finds the modules' source files (no tests, no vendored packages).
2. `prose_documents` takes the docstrings of each module and the language reference of
   `pydoc_data.topics`; `code_documents` takes the sources themselves.
3. `split` puts one document in fifty aside, by the hash of its name, for the held-out perplexity.

All of it is covered by the PSF licence. Nothing is read from the network.
"""

import ast
import hashlib
import inspect
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

_SKIPPED_FOLDERS = frozenset(
    "site-packages dist-packages test tests idlelib idle_test lib2to3 ensurepip turtledemo "
    "encodings pydoc_data __pycache__ distutils _vendor __phello__ msilib lib-dynload".split()
)
_HELD_OUT_ONE_IN = 50


@dataclass(frozen=True, slots=True)
class Document:
    """One text, named so that the held-out split is the same in every run."""

    name: str
    text: str


def library_sources() -> list[Path]:
    """Paths of the standard library's modules, sorted, tests and vendored code left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path for path in root.rglob("*.py"))
    return sorted(p for p in paths if not _SKIPPED_FOLDERS & set(p.relative_to(root).parts))


def _module_name(path: Path) -> str:
    parts = path.relative_to(sysconfig.get_paths()["stdlib"]).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _read(path: Path) -> str:
    with tokenize.open(path) as file:
        return file.read()


def _described(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        name = f"{prefix}.{child.name}"
        arguments = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
        text = ast.get_docstring(child)
        if text:
            yield f"{name}{arguments}\n\n{text}"
        yield from _described(child, name)


def prose_documents() -> list[Document]:
    """Docstrings, one document a module, and the language reference, one a topic."""
    documents = [Document(f"topic:{name}", text.strip()) for name, text in sorted(topics.items())]
    for path in library_sources():
        name = _module_name(path)
        tree = ast.parse(_read(path))
        parts = [f"{name}\n\n{ast.get_docstring(tree) or ''}".strip(), *_described(tree, name)]
        text = "\n\n\n".join(parts)
        if len(text) > 200:
            documents.append(Document(f"doc:{name}", text))
    return documents


def code_documents() -> list[Document]:
    """The sources, comments and all; files of tables are left out by their share of digits."""
    documents = []
    for path in library_sources():
        text = _read(path)
        digits = sum(map(str.isdigit, text))
        if len(text) > 400 and digits < 0.1 * len(text):
            documents.append(Document(f"code:{_module_name(path)}", text))
    return documents


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held out); a document's side depends on its name alone."""

    def held_out(document: Document) -> bool:
        digest = hashlib.sha256(document.name.encode()).digest()
        return int.from_bytes(digest[:4], "big") % _HELD_OUT_ONE_IN == 0

    return (
        [d for d in documents if not held_out(d)],
        [d for d in documents if held_out(d)],
    )


def common_words(documents: list[Document]) -> list[str]:
    """Ordinary lower-case words of three to ten letters, sorted."""
    text = "\n".join(document.text for document in documents)
    counts = Counter(re.findall(r"(?<![\w.`'\"])[a-z]{3,10}(?![\w.(`'\"=])", text))
    return sorted(word for word, count in counts.items() if count >= 4)


_SIGNATURE_LINE = re.compile(r"^[\w.]+\([^)]*\)(\s*->.*)?$|^[\w.]+\(.*\)\s->\s")
_MARKUP = (
    (re.compile(r":[a-z:]+:`~?\.?([^`<]+)`"), r"`\1`"),
    (re.compile(r"``([^`]+)``"), r"`\1`"),
    (re.compile(r"\s+"), " "),
)


def _paragraphs(docstring: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = block.splitlines()
        while lines and _SIGNATURE_LINE.match(lines[0]):
            lines.pop(0)
        text = " ".join(line.strip() for line in lines)
        for pattern, replacement in _MARKUP:
            text = pattern.sub(replacement, text)
        if text:
            yield text.strip()


def _is_prose(text: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in text)
    return letters > 0.8 * len(text) and not text.startswith(
        (">>>", "- ", "* ", "===", "---", ".. ")
    )


def summarize(docstring: str, *, limit: int = 360) -> str | None:
    """The first sentences of `docstring` as one readable line of at most `limit` characters.

    None when it holds no prose (a bare signature, a table).
    """
    summary = ""
    for text in _paragraphs(docstring):
        if not _is_prose(text):
            break
        if text.endswith(":"):
            text = text[: text.rfind(". ") + 1]
        elif not text.endswith((".", "!", "?")):
            text = text.rstrip(";,") + "."
        summary = f"{summary} {text}".strip()
        if len(summary) > 140:
            break
    if len(summary) > limit:
        cut = summary.rfind(". ", 0, limit)
        summary = summary[: cut + 1] if cut > 20 else ""
    return summary if len(summary) >= 15 else None
