"""`baton bench`: measure any OpenAI-compatible server.

Exit codes: 0 measured, 1 no request succeeded, 2 usage, 3 configuration, 4 server not ready,
130 cut short by Ctrl-C, which still reports and saves what was measured.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import load_config, render_config
from cluster.errors import UsageError
from cluster.logging import plain
from loadtest.client import ServerNotReady
from loadtest.compare import read_result, render_comparison
from loadtest.config import BenchConfig
from loadtest.report import render_notes, render_table
from loadtest.result_file import make_folder, save
from loadtest.run import run_until_interrupted

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_NOTHING_SUCCEEDED = 1
EXIT_USAGE = 2
EXIT_NOT_READY = 4
EXIT_INTERRUPTED = 130
_USAGE = """\
usage: baton bench COMMAND [options]

Measure an OpenAI-compatible server.

  run                               send requests, time their answers; Ctrl-C ends it early and
                                    still reports
  compare FIRST.json SECOND.json    lay two results of --save-result beside each other; with
                                    --markdown as a table for a report

`baton bench COMMAND --help` lists the options. Without any, run sends 1000 prompts of 1024 tokens
to http://127.0.0.1:8000, all at once."""


def main(argv: Sequence[str]) -> int:
    """Raises `ConfigError` for options that cannot work; the caller prints it."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else EXIT_USAGE
    if argv[0] == "compare":
        return bench_compare(argv[1:])
    if argv[0] != "run":
        raise UsageError(f"baton bench: there is no command {argv[0]!r}; there are: run, compare.")
    return bench_run(argv[1:])


def bench_compare(argv: Sequence[str]) -> int:
    """`--markdown`: a table for a report instead of one for a terminal."""
    if argv and argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    names = [word for word in argv if word != "--markdown"]
    if len(names) != 2 or any(word.startswith("-") for word in names):
        raise UsageError("baton bench: compare takes two files of `baton bench run --save-result`.")
    first, second = (read_result(Path(name)) for name in names)
    print(plain(render_comparison(first, second, markdown="--markdown" in argv)))
    return 0


def bench_run(argv: Sequence[str]) -> int:
    loaded = load_config(
        "baton bench run",
        (BenchConfig,),
        argv,
        os.environ,
        description="Send requests to a server and measure its answers.",
    )
    if loaded.show_config:
        print(render_config(loaded), end="")
        return 0
    config = loaded[BenchConfig]
    if config.is_saved:
        make_folder(config)
    try:
        result = run_until_interrupted(config)
    except ServerNotReady as error:
        print(f"baton bench run: {error.message}", file=sys.stderr)
        return EXIT_NOT_READY
    print(render_table(result))
    if notes := render_notes(result):
        print(notes)
    if config.is_saved:
        print(f"Saved {save(result)}")
    if result.cut is not None:
        return EXIT_INTERRUPTED
    return 0 if result.summary.completed else EXIT_NOTHING_SUCCEEDED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
