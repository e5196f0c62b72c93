"""`python -m hwsim.faults`."""

import sys

from hwsim.faults.command import main

sys.exit(main(prog="python -m hwsim.faults"))
