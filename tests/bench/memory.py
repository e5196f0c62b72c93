"""How much memory a long drain takes: the sync service alone in a process, and its largest resident size.

The terminal is a stand-in that makes each envelope when it is asked for, so that the backlog is nowhere but in the
spool. What is compared is the size after the first thousand sales and after all of them: it must not grow with them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from hwsim.host.tls import Authority
from tests.bench import drain
from tests.bench.drained import FIRST
from tests.bench.report import Row, Section

SALES: Final = 20_000
GOAL_MB: Final = 60


def run(place: Path, sales: int = SALES) -> Section:
    now, day = datetime.now(UTC), timedelta(days=1)
    authority = Authority.create(now)
    certificate, ca_file = place / "server.pem", place / "ca.pem"
    certificate.write_bytes(authority.issue(("127.0.0.1",), now - day, now + day))
    ca_file.write_bytes(authority.pem)
    program = "import sys; from tests.bench.drained import drained; drained(*sys.argv[1:])"
    with drain.serving(certificate, 0) as port:
        done = subprocess.run(
            [sys.executable, "-c", program, str(place / "sync"), f"https://127.0.0.1:{port}", str(ca_file), str(sales)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
        )
    first_kb, last_kb = json.loads(done.stdout)
    return Section(
        "memory",
        f"Memory of the sync service through a drain of {sales:,} sales",
        [
            Row(f"largest resident size after {FIRST:,}", first_kb * 1024 / 1e6, "MB"),
            Row(
                f"largest resident size after {sales:,}",
                last_kb * 1024 / 1e6,
                "MB",
                ratio=last_kb / first_kb,
                against=f"after {FIRST:,}; goal {GOAL_MB} MB in all",
            ),
        ],
        ("The interpreter and all libraries count. Stripe's, where it is configured, adds its own.",),
    )
