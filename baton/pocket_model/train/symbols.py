# ruff: noqa: SIM905 (long word lists read better as text)
"""Facts about the public names of the standard library, found by import and introspection.

A `Symbol` is one answerable name: a module, a function, a class, a method or a statement of the
language, with its summary and, where introspection gives them, its arguments.
"""

import contextlib
import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics
from types import ModuleType

from baton.pocket_model.train.corpus import summarize

# The modules that people ask about first: their names are drawn more often.
CORE_MODULES = (
    "builtins os os.path sys re json math random datetime time collections itertools functools "
    "pathlib string textwrap typing asyncio threading subprocess logging argparse csv copy enum "
    "dataclasses contextlib operator statistics heapq bisect io shutil glob tempfile hashlib "
    "urllib.request urllib.parse socket queue unittest pickle struct decimal fractions"
).split()
OTHER_MODULES = (
    "abc array ast atexit base64 binascii bz2 calendar cmath cmd code codecs codeop colorsys "
    "compileall concurrent.futures configparser contextvars copyreg cProfile ctypes curses "
    "difflib dis doctest email email.message errno faulthandler fcntl filecmp fileinput fnmatch "
    "ftplib gc getopt getpass gettext graphlib gzip hmac html html.parser http http.client "
    "http.cookies http.server imaplib importlib inspect ipaddress keyword linecache locale lzma "
    "mailbox marshal mimetypes mmap multiprocessing netrc ntpath numbers pdb pickletools pkgutil "
    "platform plistlib poplib posixpath pprint profile pstats pty py_compile pyclbr pydoc "
    "quopri readline reprlib resource rlcompleter runpy sched secrets select selectors shelve "
    "shlex signal site smtplib socketserver sqlite3 ssl stat stringprep symtable sysconfig "
    "tabnanny tarfile termios timeit tkinter token tokenize tomllib trace traceback tracemalloc "
    "tty turtle types unicodedata unittest.mock urllib.error uuid venv warnings wave weakref "
    "webbrowser wsgiref xml.dom xml.etree.ElementTree xml.sax xmlrpc.client zipapp zipfile "
    "zipimport zlib zoneinfo"
).split()
_STATEMENTS = "break continue for global if nonlocal pass raise while with".split()


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name and what can be said of it. `arguments` is None where they are not known."""

    name: str
    kind: str
    home: str
    summary: str
    arguments: tuple[str, ...] | None = None
    required: tuple[str, ...] = ()
    members: tuple[str, ...] = ()

    @property
    def short_name(self) -> str:
        return self.name.rpartition(".")[2]


def _import(name: str) -> ModuleType | None:
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
    return None


def _arguments(value: object) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    if not callable(value):
        return None
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return None
    shown = [p for p in parameters if p.name not in ("self", "cls") and not p.name.startswith("_")]
    required = [p.name for p in shown if p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD]
    return tuple(p.name for p in shown), tuple(required)


def _symbol(name: str, kind: str, home: str, value: object) -> Symbol | None:
    own = vars(value).get("__doc__") if inspect.isclass(value) else inspect.getdoc(value)
    summary = summarize(own) if isinstance(own, str) else None
    if summary is None:
        return None
    found = _arguments(value)
    arguments, required = found if found else (None, ())
    return Symbol(name, kind, home, summary, arguments, required)


def _public(module: ModuleType) -> list[str]:
    names = getattr(module, "__all__", None) or [n for n in dir(module) if not n.startswith("_")]
    return sorted(str(n) for n in names if not str(n).startswith("_"))


def _methods(owner: type, name: str) -> Iterator[Symbol]:
    for attribute, value in sorted(vars(owner).items()):
        if attribute.startswith("_") or not inspect.isroutine(getattr(owner, attribute, None)):
            continue
        if not getattr(value, "__doc__", None):
            continue
        symbol = _symbol(f"{name}.{attribute}", "method", name, getattr(owner, attribute))
        if symbol:
            yield symbol


def _of_module(name: str, *, with_methods: bool) -> Iterator[Symbol]:
    module = _import(name)
    if module is None:
        return
    prefix = "" if name == "builtins" else f"{name}."
    names = _public(module)
    summary = summarize(module.__doc__ or "")
    if summary and prefix:
        yield Symbol(name, "module", name, summary, members=tuple(names))
    for attribute in names:
        value = getattr(module, attribute, None)
        if inspect.isclass(value):
            kind = "exception" if issubclass(value, BaseException) else "class"
            symbol = _symbol(prefix + attribute, kind, name, value)
            if with_methods and kind == "class" and value.__name__ == attribute:
                yield from _methods(value, prefix + attribute)
        elif inspect.isroutine(value):
            symbol = _symbol(prefix + attribute, "function", name, value)
        else:
            continue
        if symbol:
            yield symbol


def _statement(keyword: str) -> Symbol | None:
    blocks = [b for b in topics[keyword].split("\n\n")[1:] if not b.startswith("   ")]
    summary = summarize(re.sub(r"[\"“”]", "`", "\n\n".join(blocks)), limit=600)
    return Symbol(keyword, "statement", "", summary) if summary else None


def statements() -> list[Symbol]:
    """Statements whose chapter of the language reference opens with a plain description."""
    found = map(_statement, _STATEMENTS)
    return [symbol for symbol in found if symbol]


def symbols(modules: list[str], *, with_methods: bool) -> list[Symbol]:
    """Every public name of `modules` that has a readable summary, without doubles."""
    found: dict[str, Symbol] = {}
    for module in modules:
        for symbol in _of_module(module, with_methods=with_methods):
            found.setdefault(symbol.name, symbol)
    return list(found.values())
