"""The command `payterm`: the composition root with the real drivers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from terminal import cli
from terminal.config import Config

if TYPE_CHECKING:
    from terminal.app import Hardware


def hardware(config: Config) -> Hardware:
    """The hardware that the configuration names."""
    # Imported here: commands that ask the running service must not pay for libraries that drive hardware.
    from drivers.nfc import Pn532Reader
    from drivers.oled import Oled
    from terminal.app import Hardware

    return Hardware(
        reader=Pn532Reader(config.reader.path),
        display=Oled.on_i2c(config.display.i2c_port, config.display.i2c_address),
    )


def main() -> None:
    """Entry point."""
    sys.exit(cli.main(sys.argv[1:], hardware))


if __name__ == "__main__":
    main()
