"""The command `payterm`: the composition root with the real drivers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from terminal import cli
from terminal.config import Config, ConfigError

if TYPE_CHECKING:
    from terminal.app import Hardware


def hardware(config: Config) -> Hardware:
    """The hardware that the configuration names. Raises `ConfigError`."""
    # Imported here: commands that ask the running service must not pay for libraries that drive hardware.
    from drivers.gpio import Gpio, HeaderLamps, MatrixKeypad, OutputLines, Pins, PwmBuzzer
    from drivers.interfaces import CardReader, PinFault
    from drivers.nfc import Pn532Reader
    from drivers.oled import Oled
    from terminal.app import Hardware

    readers: list[CardReader] = [Pn532Reader(config.reader.path)]
    if config.contact is not None:
        from drivers.pcsc import PcscReader

        readers.insert(0, PcscReader(config.contact.reader))
    gpio = Gpio(config.pins.back_end if config.pins else "lgpio")
    panel = config.display
    if panel.bus == "spi":
        lines = OutputLines(gpio)
        display = Oled.on_spi(
            lines,
            panel.spi_port,
            panel.spi_device,
            data_command=panel.data_command,
            reset=panel.reset,
            controller=panel.controller,
        )
    else:
        display = Oled.on_i2c(panel.i2c_port, panel.i2c_address, controller=panel.controller)
    if config.pins is None:
        return Hardware(readers=tuple(readers), display=display)
    try:
        pins = Pins(
            rows=config.pins.rows,
            columns=config.pins.columns,
            lamps=config.pins.lamps,
            status=config.pins.status,
            buzzer=config.pins.buzzer,
        )
    except PinFault as fault:
        raise ConfigError(f"[pins]: {fault}. Nothing was started.") from fault
    return Hardware(
        readers=tuple(readers),
        display=display,
        keypad=MatrixKeypad(gpio, pins),
        lamps=HeaderLamps(gpio, pins),
        buzzer=PwmBuzzer(gpio, pins),
    )


def main() -> None:
    """Entry point."""
    sys.exit(cli.main(sys.argv[1:], hardware))


if __name__ == "__main__":
    main()
