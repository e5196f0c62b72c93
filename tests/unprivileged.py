"""`payterm-sim` without root's power over files, for tests that run as root: rights then count, as for the service."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    without = "--bounding-set=-dac_override,-dac_read_search"
    command = ["setpriv", without, sys.executable, "-P", "-m", "hwsim", *sys.argv[1:]]
    os.execvp(command[0], command)  # noqa: S606 (there is nothing for a shell to do)
