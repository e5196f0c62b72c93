"""`payterm-sim sales` with bugs planted, for the tests: the modules named by --plant are imported first."""

from __future__ import annotations

import argparse
import importlib
import sys

from hwsim import sales


def main() -> int:
    root = argparse.ArgumentParser()
    root.add_argument("--plant", action="append", default=[])
    sales.add_parser(root.add_subparsers(required=True))
    options = root.parse_args()
    for plant in options.plant:
        importlib.import_module(plant)
    code: int = options.command(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
