"""`payterm sync`: how the upload side stands, and sending what waits.

Exit codes of `status` and `now --wait`, the gravest first: 6 something is held for a person, 7 something has waited
for more than a day, 8 a destination is not reached; 0 none of that.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from terminal.clock import SystemClock, system_entropy
from terminal.commands.base import Commands, HardwareFactory, age, configured, money, print_json, say, takes_json
from terminal.control import ControlClient

if TYPE_CHECKING:
    from rich.console import RenderableType

HELD: Final = 6
OVERDUE: Final = 7
NOT_REACHED: Final = 8
OVERDUE_MS: Final = 24 * 3_600_000
_LOOK_EVERY_S: Final = 0.5
_STILL_MAX_S: Final = 30.0  # nothing has moved and a destination is not reached: waiting longer is the service's job

_MODES: Final = {
    "immediate": "at once, whenever there is a network",
    "interval": "at intervals",
    "window": "in its windows",
    "metered": "in bundles, to save connections",
    "manual": "when told to: payterm sync now",
}


def add(commands: Commands) -> None:
    group = commands.group("sync", "the upload service")
    group.add("run", _run, "run the sync service")
    status = takes_json(group.add("status", _status, "how it stands with each destination"))
    status.add_argument("--watch", action="store_true", help="go on showing it, until Ctrl-C")
    now = takes_json(group.add("now", _now, "send what waits at once, whatever the schedule and the waits say"))
    now.add_argument("--wait", action="store_true", help="until everything is sent, or cannot be for now")


def _run(options: argparse.Namespace, _: HardwareFactory) -> int:
    from terminal.cli import stop_on_signals
    from terminal.sync import service

    config = configured(options)
    with stop_on_signals() as stop:
        service.run(config, clock=SystemClock(), entropy=system_entropy, stop=stop)
    return 0


def _status(options: argparse.Namespace, _: HardwareFactory) -> int:
    with _client(options) as client:
        status = client.call("sync.status")
        if options.json:
            print_json(status)
            return code_of(status)
        from rich.console import Console
        from rich.live import Live

        if not options.watch:
            Console().print(_table(status))
            return code_of(status)
        with Live(_table(status), auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(2 * _LOOK_EVERY_S)
                status = client.call("sync.status")
                live.update(_table(status), refresh=True)
    return code_of(status)


def _now(options: argparse.Namespace, _: HardwareFactory) -> int:
    with _client(options) as client:
        queued = client.call("sync.now")["queued"]
        if options.wait:
            try:
                status = _drained(client, queued, quiet=options.json or not sys.stderr.isatty())
            except KeyboardInterrupt:
                say("the upload goes on by itself; payterm sync status shows how far it is")
                raise
        else:
            status = client.call("sync.status")
    left = sum(each["queued"] for each in status["destinations"])
    code = code_of(status) if options.wait else 0
    if options.json:
        print_json({"queued": queued, "left": left, "status": status})
    elif not options.wait:
        print(f"{_items(queued)} to send: on the way" if queued else "nothing waits")
    elif left:
        print(f"{_items(left)} of {queued} could not be sent for now; stored safely, and tried again by itself")
    else:
        print(f"{_items(queued)} sent" if queued else "nothing waited")
    return code


def _drained(client: ControlClient, queued: int, *, quiet: bool) -> dict[str, Any]:
    """Wait until nothing is left, or nothing moves and a destination is not reached; the last status."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as progress:
        task = progress.add_task("sending", total=queued)
        moved_s, before = time.monotonic(), queued
        while True:
            status = client.call("sync.status")
            left = sum(each["queued"] for each in status["destinations"])
            if left != before:
                moved_s, before = time.monotonic(), left
            # New sales come while it drains: they count as well.
            total = max(queued, left)
            sums = {code: minor for each in status["destinations"] for code, minor in each["sums"].items()}
            what = ", ".join(money(minor, code) for code, minor in sums.items() if minor)
            progress.update(task, total=total, completed=total - left, description=f"sending {what}".rstrip())
            reached = all(each["online"] is not False for each in status["destinations"])
            if not left or (time.monotonic() - moved_s > _STILL_MAX_S and not reached):
                return status
            time.sleep(_LOOK_EVERY_S)


def code_of(status: dict[str, Any]) -> int:
    """The exit code that fits."""
    destinations = status["destinations"]
    if any(each["held"] for each in destinations):
        return HELD
    if any((each["oldest_ms"] or 0) > OVERDUE_MS for each in destinations):
        return OVERDUE
    return NOT_REACHED if any(each["online"] is False for each in destinations) else 0


def _table(status: dict[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("to", "link"):
        table.add_column(name)
    for name in ("waits", "held", "sum", "oldest", "last sent"):
        table.add_column(name, justify="right")
    notes = []
    for each in status["destinations"]:
        match each["online"], each["stable"]:
            case None, _:
                link = Text("not tried yet", "dim")
            case False, _:
                link = Text("not reached", "red")
            case _, False:
                link = Text("just back", "yellow")
            case _:
                link = Text("reached", "green")
        sums = "\n".join(money(minor, code) for code, minor in each["sums"].items())
        held = Text(str(each["held"]), "bold red" if each["held"] else "")
        sent = f"{age(each['last_success_ms'])} ago" if each["last_success_ms"] is not None else "never"
        table.add_row(each["name"], link, str(each["queued"]), held, sums, age(each["oldest_ms"]), sent)
        if each["error"] is not None:
            silent = f", next try in {age(each['silent_ms'])}" if each["silent_ms"] else ""
            notes.append(Text(f"{each['name']}: {each['error']}{silent}", "red"))
        elif each["last_error"] is not None:
            notes.append(Text(f"{each['name']}: {age(each['last_error_ms'])} ago: {each['last_error']}", "dim"))
        if each["held"]:
            notes.append(Text(f"{each['name']}: {each['held']} held for a person: payterm queue list", "bold red"))
    if not status["now"]["synchronised"]:
        notes.append(Text("the clock is not set: certificates may be refused", "yellow"))
    mode = _MODES[status["mode"]]
    closed = "" if status["backlog_open"] else " (not now)"
    return Group(table, *notes, Text(f"the backlog is sent {mode}{closed}; what a customer waits for, always", "dim"))


@contextlib.contextmanager
def _client(options: argparse.Namespace) -> Iterator[ControlClient]:
    with contextlib.closing(ControlClient(configured(options).sync.socket, unit="payterm-sync")) as client:
        yield client


def _items(count: int) -> str:
    return f"{count} item" if count == 1 else f"{count} items"
