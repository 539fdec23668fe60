"""`baton admin`: look at a running cluster and steer it, over the gateway's admin API.

Each command is one call. Tables are for people; `--output json` is the API's own answer.
Exit codes: 0 done, 1 refused, 2 usage, 4 not reachable.
"""

from __future__ import annotations

import json
import sys
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from baton.admin_client import (
    DEFAULT_URL,
    AdminClient,
    AdminRefused,
    AdminUnreachable,
    admin_client,
)
from baton.admin_tables import (
    LEASES,
    NODES,
    REQUESTS,
    Column,
    remarks_on,
    render_policy,
    render_rows,
    shown,
)
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_REFUSED = 1
EXIT_NOT_READY = 4
POLL_SECONDS = 0.5  # a node says its state this often


class Output(StrEnum):
    TABLE = "table"
    JSON = "json"


# What every command takes, after its name as people write it.
Url = Annotated[
    str,
    typer.Option("--admin-url", envvar="BATON_ADMIN_URL", help="Where the gateway's admin API is."),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--admin-token",
        envvar="BATON_ADMIN_TOKEN",
        help="Its token. Default: what `baton serve` left for this user.",
    ),
]
Form = Annotated[Output, typer.Option("--output", "-o", help="How the answer is printed.")]

app = typer.Typer(
    help="Look at a running cluster and steer it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
policy_app = typer.Typer(help="Read and change the live policy.", no_args_is_help=True)
app.add_typer(policy_app, name="policy")


def main(argv: Sequence[str]) -> int:
    try:
        app(args=list(argv), prog_name="baton admin")
    except SystemExit as ended:  # how typer ends, with its own exit code
        return ended.code if isinstance(ended.code, int) else EXIT_REFUSED
    except AdminUnreachable as error:
        print(f"baton admin: {error.message}", file=sys.stderr)
        return EXIT_NOT_READY
    except AdminRefused as error:
        print(f"baton admin: {error.message}", file=sys.stderr)
        return EXIT_REFUSED
    return 0


def _add_listing(collection: str, columns: Sequence[Column], summary: str) -> None:
    def show(url: Url = DEFAULT_URL, token: Token = None, form: Form = Output.TABLE) -> None:
        document = connect(url, token).get(f"/{collection}")
        if form is Output.JSON:
            _print_json(document)
            return
        rows = document.get(collection)
        if not isinstance(rows, list):
            raise AdminUnreachable(f"{url} answers, but not as a Baton admin API.")
        render_rows(rows, columns, empty=f"No {collection}.")
        for remark in remarks_on(rows):
            print(f"baton admin: {remark}", file=sys.stderr)
        for name in document.get("unreachable") or ():
            told = f"baton admin: {shown(name)} did not answer; its {collection} are missing."
            print(told, file=sys.stderr)

    app.command(collection, help=summary)(show)


def _add_action(verb: str, collection: str, named: str, summary: str) -> None:
    argument = typer.Argument(metavar=named)

    def act(
        target: str = argument,
        url: Url = DEFAULT_URL,
        token: Token = None,
        form: Form = Output.TABLE,
    ) -> None:
        _show_action(verb, target, connect(url, token).act(collection, target, verb), form)

    app.command(verb, help=summary)(act)


_add_listing("nodes", NODES, "List the nodes: role, state, load.")
_add_listing("requests", REQUESTS, "List the requests that run now.")
_add_listing("leases", LEASES, "List the KV leases that nodes hold.")
_add_action("cordon", "nodes", "NODE", "Give a node no new work.")
_add_action("uncordon", "nodes", "NODE", "Give a cordoned node new work again.")
_add_action("cancel", "requests", "REQUEST", "End a request, by its id or its answer's.")


@app.command("drain")
def drain(
    node: Annotated[str, typer.Argument(metavar="NODE")],
    wait: Annotated[bool, typer.Option("--wait", help="Return when its work has ended.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    form: Form = Output.TABLE,
) -> None:
    """Cordon a node and let its work come to an end."""
    client = connect(url, token)
    document = client.act("nodes", node, "drain")
    if wait:
        document["state"] = _wait_until_drained(client, node)
    _show_action("drain", node, document, form)


def _wait_until_drained(client: AdminClient, name: str) -> str:
    """The state it ends in. Raises `AdminRefused` when it takes work again. That the gateway has
    lost it is no end: it may still run what it has, and is reached again, or its entry expires."""
    while True:
        nodes = client.get("/nodes").get("nodes") or ()
        state = next((node.get("state") for node in nodes if node.get("name") == name), "gone")
        if state in ("drained", "gone"):
            return str(state)
        if state not in ("draining", "lost"):
            raise AdminRefused(f"{name} is {shown(state)} again: somebody has uncordoned it.")
        time.sleep(POLL_SECONDS)


@app.command("reset-prefix-cache")
def reset_prefix_cache(
    url: Url = DEFAULT_URL, token: Token = None, form: Form = Output.TABLE
) -> None:
    """Have every node forget its cached prefixes, as before a measurement."""
    document = connect(url, token).post("/prefix-cache:reset", {})
    if form is Output.JSON:
        _print_json(document)
    else:
        print(f"reset on {shown(document.get('nodes'))}")


@policy_app.command("get")
def policy_get(url: Url = DEFAULT_URL, token: Token = None, form: Form = Output.TABLE) -> None:
    """Show the live policy."""
    _show_policy(connect(url, token).get("/policy"), form)


@policy_app.command("set")
def policy_set(
    settings: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...")],
    url: Url = DEFAULT_URL,
    token: Token = None,
    form: Form = Output.TABLE,
) -> None:
    """Change the policy; all settings take effect together, or none."""
    changes = dict(parse_setting(text) for text in settings)
    _show_policy(connect(url, token).patch("/policy", changes), form)


def connect(url: str, token: str | None) -> AdminClient:
    try:
        return admin_client(url, token)
    except ConfigError as error:
        raise typer.BadParameter(error.message, param_hint="--admin-url") from error


def parse_setting(text: str) -> tuple[str, object]:
    """`a-b=1` -> ("a_b", 1): the value is JSON where it is JSON, else a string."""
    key, equals, value = text.partition("=")
    key = key.replace("-", "_")  # as the flag of the same option is written
    if not key or not equals:
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _show_action(verb: str, target: str, document: dict[str, Any], form: Output) -> None:
    if form is Output.JSON:
        _print_json(document)
    else:
        print(f"{verb} {target}: {shown(document.get('state', 'done'))}")


def _show_policy(document: dict[str, Any], form: Output) -> None:
    if form is Output.JSON:
        _print_json(document)
    else:
        render_policy(document)


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
