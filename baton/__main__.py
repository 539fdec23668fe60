"""The `baton` command: one line per program, each loaded only when asked for.

`baton gateway` must start without torch, so programs are resolved by name with importlib.
Exit codes: 0 done, 2 usage, 3 configuration, 4 not ready, 130 interrupted,
141 the reader of the output has left.
"""

from __future__ import annotations

import importlib
import os
import select
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import ConfigError
from cluster.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXIT_USAGE = 2
EXIT_CONFIG = 3
EXIT_INTERRUPTED = 130
STANDARD_OUTPUT = 1
EXIT_BROKEN_PIPE = 141  # as of a program that SIGPIPE ends

ROOMS = (
    *("baton", "gateway", "prefill_node", "decode_node", "loadtest"),
    *("node_parts", "engine", "kv_transfer", "kernels", "cluster"),
)


@dataclass(frozen=True, slots=True)
class Program:
    name: str
    module: str  # has `main(argv) -> int`
    summary: str


PROGRAMS = (
    Program("serve", "baton.serve", "a whole cluster on this machine: gateway, nodes, Redis"),
    Program("gateway", "gateway.__main__", "the HTTP edge alone"),
    Program("prefill", "prefill_node.__main__", "one prefill node"),
    Program("decode", "decode_node.__main__", "one decode node"),
    Program("bench", "loadtest.__main__", "measure any OpenAI-compatible server"),
    Program("admin", "baton.admin", "look at and steer a running cluster"),
    Program("doctor", "baton.doctor", "what is installed here and what works"),
)


def usage() -> str:
    lines = ["usage: baton COMMAND [options]", "", "Serve language models with split pools.", ""]
    lines += [f"  {program.name:<10} {program.summary}" for program in PROGRAMS]
    lines += ["", "`baton COMMAND --help` lists the options; `baton --version` the version."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        code = obey(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        if not _has_lost_its_reader():
            raise
        return EXIT_BROKEN_PIPE
    return code


def obey(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else EXIT_USAGE
    if arguments[0] in ("-V", "--version"):
        print(f"baton {VERSION}")
        return 0
    program = next((p for p in PROGRAMS if p.name == arguments[0]), None)
    if program is None:
        print(f"baton: there is no command {arguments[0]!r}.\n\n{usage()}", file=sys.stderr)
        return EXIT_USAGE
    return run_program(program, arguments[1:])


def run_program(program: Program, arguments: Sequence[str]) -> int:
    try:
        entry: Callable[[Sequence[str]], int] = importlib.import_module(program.module).main
        return entry(arguments)
    except ConfigError as error:
        is_named = error.message.startswith(f"baton {program.name}")
        prefix = "" if is_named else f"baton {program.name}: "
        print(prefix + error.message, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ROOMS:
            raise  # ours: a defect, not a missing package
        print(
            f"baton {program.name}: the package {error.name!r} is not installed. "
            f"`pip install 'baton-serve[local]'` brings what one machine needs.",
            file=sys.stderr,
        )
        return EXIT_CONFIG


def _has_lost_its_reader() -> bool:
    """Whether whoever read the output has left, as `| head` does. Python says so once more at its
    end, unless what is left of the output goes nowhere."""
    output = select.poll()
    output.register(STANDARD_OUTPUT, 0)
    if not output.poll(0):  # a broken end is told unasked
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), STANDARD_OUTPUT)
    return True


if __name__ == "__main__":
    sys.exit(main())
