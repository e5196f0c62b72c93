"""`python -m hwsim.sdcard`."""

import sys

from hwsim.sdcard.command import main

sys.exit(main())
