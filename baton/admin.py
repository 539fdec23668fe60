"""`baton admin`: look at a running cluster and steer it, over the gateway's admin API.

Each command is one call, drain --wait and requests --id excepted. Tables are for people;
`--output json` is the API's own answer.
Exit codes: 0 done, 1 refused, 2 usage, 3 configuration, 4 not reachable.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from baton.admin_client import AdminClient, AdminRefused, AdminUnreachable, admin_client
from baton.admin_drain import wait_until_drained
from baton.admin_options import (
    AdminConfig,
    CancelConfig,
    DrainConfig,
    NodeConfig,
    PolicyConfig,
    RequestsConfig,
)
from baton.admin_tables import (
    ENDED,
    LEASES,
    NODES,
    REQUESTS,
    Column,
    remarks_on,
    render_policy,
    render_rows,
    shown,
)
from cluster.config import load_config, render_config
from cluster.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.config import LoadedConfig

EXIT_REFUSED = 1
EXIT_USAGE = 2
EXIT_NOT_READY = 4
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Command:
    """`name` as it is typed. `options` are its own, `argument` the one given without a flag."""

    name: str
    summary: str
    run: Callable[[LoadedConfig], None]
    options: tuple[type, ...] = ()
    argument: str | None = None

    @property
    def usage(self) -> str:
        return self.name if self.argument is None else f"{self.name} {self.argument.upper()}"


def main(argv: Sequence[str]) -> int:
    """Raises `UsageError` and `ConfigError`; the caller prints them."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else EXIT_USAGE
    command, arguments = find(argv)
    loaded = load_config(
        f"baton admin {command.name}",
        (*command.options, AdminConfig),
        arguments,
        os.environ,
        positional=command.argument,
        description=command.summary,
    )
    if loaded.show_config:
        print(render_config(loaded), end="")
        return 0
    try:
        command.run(loaded)
    except AdminUnreachable as error:
        print(f"baton admin: {shown(error.message)}", file=sys.stderr)
        return EXIT_NOT_READY
    except AdminRefused as error:
        print(f"baton admin: {shown(error.message)}", file=sys.stderr)
        return EXIT_REFUSED
    return 0


def usage() -> str:
    lines = ["usage: baton admin COMMAND [options]", ""]
    lines += ["Look at a running cluster and steer it.", ""]
    width = max(len(command.usage) for command in COMMANDS)
    lines += [f"  {command.usage:<{width}}  {command.summary}" for command in COMMANDS]
    lines += ["", "`baton admin COMMAND --help` lists the options."]
    return "\n".join(lines)


def find(argv: Sequence[str]) -> tuple[Command, Sequence[str]]:
    """The command that `argv` begins with, and what follows its name."""
    for command in COMMANDS:
        words = command.name.split()
        if list(argv[: len(words)]) == words:
            return command, argv[len(words) :]
    family = [each.name for each in COMMANDS if each.name.startswith(f"{argv[0]} ")]
    if family and argv[1:2] and argv[1] in ("-h", "--help"):
        print(usage())
        raise SystemExit(0)
    known = ", ".join(family or [command.name for command in COMMANDS])
    typed = " ".join(argv[:2] if family else argv[:1])
    raise UsageError(f"baton admin: there is no command {typed!r}; there are: {known}.")


# ---- what there is ---------------------------------------------------------------------------


def _listing(collection: str, columns: Sequence[Column]) -> Callable[[LoadedConfig], None]:
    def show(loaded: LoadedConfig) -> None:
        document = _connected(loaded).get(f"/{collection}")
        _show_rows(loaded, document, collection, columns, empty=f"No {collection}.")

    return show


def _requests(loaded: LoadedConfig) -> None:
    asked, client = loaded[RequestsConfig], _connected(loaded)
    by_id = {} if asked.id is None else {"id": asked.id}
    if not (asked.ended or asked.failed):
        document = client.get(_with_query("/requests", by_id))
        if document.get("requests") or asked.id is None:
            _show_rows(loaded, document, "requests", REQUESTS, empty="No requests run.")
            return
    query = {**by_id, "last": str(asked.last), **({"failed": "true"} if asked.failed else {})}
    document = client.get(_with_query("/requests/ended", query))
    empty = "No request that is remembered has ended so."
    if asked.id is not None:
        empty = "No request with this id runs, or is remembered by this gateway."
    _show_rows(loaded, document, "requests", ENDED, empty=empty)


def _with_query(path: str, query: dict[str, str]) -> str:
    return f"{path}?{urlencode(query, errors='surrogateescape')}" if query else path


def _show_rows(
    loaded: LoadedConfig, document: Json, collection: str, columns: Sequence[Column], *, empty: str
) -> None:
    if _is_json(loaded):
        _print_json(document)
        return
    rows = document.get(collection)
    if not isinstance(rows, list):
        url = loaded[AdminConfig].admin_url
        raise AdminUnreachable(f"{url} answers, but not as a Baton admin API.")
    render_rows(rows, columns, empty=empty)
    for remark in remarks_on(rows):
        print(f"baton admin: {remark}", file=sys.stderr)
    for name in document.get("unreachable") or ():
        told = f"baton admin: {shown(name)} did not answer; its {collection} are missing."
        print(told, file=sys.stderr)


# ---- levers ----------------------------------------------------------------------------------


def _order(verb: str) -> Callable[[LoadedConfig], None]:
    def order(loaded: LoadedConfig) -> None:
        name = loaded[NodeConfig].node
        _show_action(loaded, verb, name, _connected(loaded).act("nodes", name, verb))

    return order


def _drain(loaded: LoadedConfig) -> None:
    asked, client = loaded[DrainConfig], _connected(loaded)
    name = asked.node
    document = client.act("nodes", name, "drain")
    if asked.wait:
        document["state"] = wait_until_drained(client, name, asked.timeout)
    _show_action(loaded, "drain", name, document)


def _cancel(loaded: LoadedConfig) -> None:
    request = loaded[CancelConfig].request
    document = _connected(loaded).act("requests", request, "cancel")
    _show_action(loaded, "cancel", request, document)


def _reset_prefix_cache(loaded: LoadedConfig) -> None:
    document = _connected(loaded).post("/prefix-cache:reset", {})
    if _is_json(loaded):
        _print_json(document)
    else:
        print(f"reset on {shown(document.get('nodes'))}")


def _policy_get(loaded: LoadedConfig) -> None:
    _show_policy(loaded, _connected(loaded).get("/policy"))


def _policy_set(loaded: LoadedConfig) -> None:
    changes = dict(parse_setting(text) for text in loaded[PolicyConfig].setting)
    _show_policy(loaded, _connected(loaded).patch("/policy", changes))


COMMANDS = (
    Command("nodes", "List the nodes: role, state, load.", _listing("nodes", NODES)),
    Command(
        "requests", "List the requests that run, or how the last ended.", _requests,
        (RequestsConfig,),
    ),
    Command("leases", "List the KV leases that nodes hold.", _listing("leases", LEASES)),
    Command("cordon", "Give a node no new work.", _order("cordon"), (NodeConfig,), "node"),
    Command(
        "uncordon", "Give a cordoned node new work again.", _order("uncordon"), (NodeConfig,),
        "node",
    ),
    Command("drain", "Cordon a node and let its work end.", _drain, (DrainConfig,), "node"),
    Command("cancel", "End a request.", _cancel, (CancelConfig,), "request"),
    Command(
        "reset-prefix-cache", "Have every node forget its cached prefixes.", _reset_prefix_cache
    ),
    Command("policy get", "Show the live policy.", _policy_get),
    Command(
        "policy set", "Change it: all settings take effect together, or none.", _policy_set,
        (PolicyConfig,), "setting",
    ),
)  # fmt: skip


# ---- helpers ---------------------------------------------------------------------------------


def _connected(loaded: LoadedConfig) -> AdminClient:
    config = loaded[AdminConfig]
    try:
        return admin_client(config.admin_url, config.admin_token)
    except ConfigError as error:
        raise UsageError(f"{loaded.program}: {error.message}") from error


def parse_setting(text: str) -> tuple[str, object]:
    """`a-b=1` -> ("a_b", 1): the value is JSON where it is JSON, else a string."""
    key, equals, value = text.partition("=")
    key = key.replace("-", "_")  # as the flag of the same option is written
    if not key or not equals:
        raise UsageError(f"baton admin policy set: {text!r} is not KEY=VALUE.")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


def _show_action(loaded: LoadedConfig, verb: str, target: str, document: Json) -> None:
    if _is_json(loaded):
        _print_json(document)
    else:
        print(f"{verb} {target}: {shown(document.get('state', 'done'))}")


def _show_policy(loaded: LoadedConfig, document: Json) -> None:
    if _is_json(loaded):
        _print_json(document)
    else:
        render_policy(document)


def _is_json(loaded: LoadedConfig) -> bool:
    return loaded[AdminConfig].output == "json"


def _print_json(document: Json) -> None:
    """No control character reaches the terminal, as in a table: here they are escaped."""
    lines = json.dumps(document, indent=2, ensure_ascii=False).split("\n")
    for line in lines:
        print("".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in line))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
