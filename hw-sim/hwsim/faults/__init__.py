"""A bad network between a client and a server: a proxy whose faults are switched, or drawn by a seed, while it runs.

`plan` says what can go wrong and draws it; `transparent` carries bytes and needs no keys; `terminating` speaks TLS and
HTTP to both sides, for what can only be done to a request or an answer; `network` is what all connections share;
`proxy` listens; `command` is the proxy as a process. What the faults look like from the client: docs/faults.md.
"""

from hwsim.faults.command import main
from hwsim.faults.network import Played, Stats
from hwsim.faults.plan import Fault, Plan, Severity
from hwsim.faults.proxy import CONNECTIONS_MAX, FaultProxy
from hwsim.faults.terminating import Termination

__all__ = ["CONNECTIONS_MAX", "Fault", "FaultProxy", "Plan", "Played", "Severity", "Stats", "Termination", "main"]
