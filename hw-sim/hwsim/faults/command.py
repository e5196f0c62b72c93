"""The proxy as a process: orders come on standard input, one a line, and each is answered by one line."""

from __future__ import annotations

import argparse
import contextlib
import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from hwsim.faults.plan import ALL, STORMS, TRANSPARENT, Fault, Plan
from hwsim.faults.proxy import FaultProxy
from hwsim.faults.terminating import Termination
from hwsim.host.keys import HostKeyError

_DESCRIPTION: Final = """\
A bad network between the upload service and a server, on loopback. Without an authority it carries bytes as they come,
needs no keys, and plays what can be played on connections. With one it speaks TLS and HTTP to both sides and plays
everything. Faults are switched by orders on standard input, or drawn: the same seed draws the same faults.
"""
_ORDERS: Final = """\
orders on standard input, one a line, each answered by one line:
  FAULT                   from now on this and nothing else, to running connections, too; `pass` for none
  4xx|5xx STATUS [AFTER]  the same, always with this status and a Retry-After of so many seconds
  plan                    back to the drawn faults
  delay MS [JITTER]       everything that goes back comes so much later
  cut                     reset what runs
  stats                   what has been carried and played
  url                     what to configure a client with, and a name that does not resolve

faults:
"""


def main(arguments: Sequence[str] | None = None, *, prog: str = "payterm-sim faults") -> int:
    """Run until standard input ends. Returns the exit code."""
    options = _parser(prog).parse_args(arguments)
    upstream = _address(options.upstream)
    if upstream is None:
        print(f"{prog}: {options.upstream} is no HOST:PORT", file=sys.stderr)
        return 2
    try:
        termination = None
        if options.authority is not None or options.http:
            termination = Termination(
                options.authority,
                upstream_tls=not options.plain_upstream,
                client_certificate=options.client_certificate,
            )
        plan = _plan(options, terminating=termination is not None)
        with contextlib.ExitStack() as stack:
            log = sys.stderr
            if options.log is not None:
                log = stack.enter_context(options.log.open("a", encoding="utf-8"))
            proxy = stack.enter_context(
                FaultProxy(
                    upstream,
                    port=options.port,
                    termination=termination,
                    plan=plan,
                    seed=options.seed,
                    report=lambda played: print(played, file=log, flush=True),
                )
            )
            proxy.delay_ms, proxy.jitter_ms = options.delay, options.jitter
            if plan is not None:
                print(f"seed {plan.seed}, rate {plan.rate}", file=log, flush=True)
            print(f"listening on 127.0.0.1:{proxy.port}", flush=True)
            for line in sys.stdin:
                print(_obey(proxy, plan, line.split()), flush=True)
    except (HostKeyError, OSError, ValueError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    bare = ", ".join(fault.value for fault in Fault if fault in TRANSPARENT)
    rest = ", ".join(fault.value for fault in Fault if fault in ALL - TRANSPARENT)
    parser = argparse.ArgumentParser(
        prog=prog,
        description=_DESCRIPTION,
        epilog=f"{_ORDERS}  always: {bare}\n  with --authority or --http: {rest}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("upstream", metavar="HOST:PORT", help="the server behind the proxy")
    parser.add_argument("--port", type=int, default=0, help="where to listen on loopback (default: a free port)")
    parser.add_argument("--delay", type=int, default=0, metavar="MS", help="everything that goes back comes later")
    parser.add_argument("--jitter", type=int, default=0, metavar="MS", help="at most so much later still")
    parser.add_argument("--log", type=Path, metavar="FILE", help="append the faults played (default: standard error)")
    seeing = parser.add_argument_group("to see requests and answers")
    kind = seeing.add_mutually_exclusive_group()
    kind.add_argument(
        "--authority",
        type=Path,
        metavar="DIR",
        help="a directory that `payterm-sim host` has provisioned: its authority signs the proxy's certificates",
    )
    kind.add_argument("--http", action="store_true", help="no TLS on either side")
    seeing.add_argument("--plain-upstream", action="store_true", help="no TLS towards the server")
    seeing.add_argument(
        "--client-certificate", type=Path, metavar="FILE", help="key and certificate to show to the server, PEM"
    )
    drawing = parser.add_argument_group("to draw faults by a seed")
    drawing.add_argument("--faults", metavar="all|NAME,...", help="what may happen (default: nothing)")
    drawing.add_argument("--rate", type=float, default=0.3, help="to which share of all (default: %(default)s)")
    drawing.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="(default: any; it is logged)")
    return parser


def _address(text: str) -> tuple[str, int] | None:
    host, _, port = text.rpartition(":")
    return (host, int(port)) if host and port.isdecimal() else None


def _plan(options: argparse.Namespace, *, terminating: bool) -> Plan | None:
    """The faults asked for, alike in weight. Raises `ValueError`."""
    if options.faults is None:
        return None
    if options.faults == "all":
        faults = ALL if terminating else TRANSPARENT
    else:
        faults = frozenset(_fault(name) for name in options.faults.split(","))
    return Plan(options.seed, dict.fromkeys(faults, 1.0), rate=options.rate)


def _fault(name: str) -> Fault:
    try:
        return Fault(name)
    except ValueError:
        raise ValueError(f"{name} is no fault; there are {', '.join(fault.value for fault in Fault)}") from None


def _obey(proxy: FaultProxy, plan: Plan | None, words: list[str]) -> str:
    """Carry out an order; what to answer."""
    answer = f"orders: cut, stats, url, plan, delay MS [JITTER], {', '.join(fault.value for fault in Fault)}"
    match words:
        case ["cut"]:
            answer = f"cut {proxy.cut()}"
        case ["stats"]:
            answer = f"stats {proxy.stats()}"
        case ["url"]:
            answer = f"url {proxy.url} does not resolve: {proxy.unresolvable_url}"
        case ["delay", delay_ms] if delay_ms.isdecimal():
            proxy.delay_ms, proxy.jitter_ms = int(delay_ms), 0
            answer = f"delay {delay_ms}"
        case ["delay", delay_ms, jitter_ms] if delay_ms.isdecimal() and jitter_ms.isdecimal():
            proxy.delay_ms, proxy.jitter_ms = int(delay_ms), int(jitter_ms)
            answer = f"delay {delay_ms} {jitter_ms}"
        case ["plan"] if plan is not None:
            proxy.follow(plan)
            answer = f"plan, seed {plan.seed}"
        case [name, *status] if name in {fault.value for fault in Fault}:
            answer = _switch(proxy, Fault(name), status)
    return answer


def _switch(proxy: FaultProxy, fault: Fault, status: list[str]) -> str:
    """A fault, which for storms may be said more precisely: status, Retry-After in seconds."""
    numbers = [int(word) for word in status if word.isdecimal()]
    said = [f"{number // 100}xx" for number in numbers[:1]]
    if len(numbers) != len(status) or len(status) > 2 or (status and (fault not in STORMS or said != [fault.value])):
        return f"{fault.value} is ordered as in --help"
    try:
        proxy.severity = replace(
            proxy.severity, status=numbers[0] if numbers else None, retry_after_s=numbers[1] if numbers[1:] else None
        )
        proxy.switch(fault)
    except ValueError as error:
        return f"error: {error}"
    return " ".join([fault.value, *status])
