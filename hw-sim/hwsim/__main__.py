"""The command `payterm-sim`: the composition root with simulated hardware, and each part of the simulator by itself."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from drivers.interfaces import CardReader
from terminal import VERSION, cli
from terminal.config import Config

if TYPE_CHECKING:
    from terminal.app import Hardware


def hardware(device: Path) -> Callable[[Config], Hardware]:
    """The same drivers as on a Pi, over the device in this directory."""

    def build(_: Config) -> Hardware:
        from drivers.gpio import Gpio, HeaderLamps, MatrixKeypad, Pins, PwmBuzzer
        from drivers.nfc import Pn532Reader
        from drivers.oled import Oled
        from hwsim.gpio import SocketWires, install
        from hwsim.ssd1306 import SocketBus
        from hwsim.vpcd import READER_NAME
        from terminal.app import Hardware

        readers: list[CardReader] = [Pn532Reader(str(device / "nfc"))]
        if (environment := device / "pcsc.json").exists():
            os.environ.update(json.loads(environment.read_bytes()))  # before the PC/SC library is loaded
            from drivers.pcsc import PcscReader

            readers.insert(0, PcscReader(READER_NAME))
        install(SocketWires(device / "gpio.sock"))
        gpio, pins = Gpio("rpigpio"), Pins()
        return Hardware(
            readers=tuple(readers),
            display=Oled(lambda: SocketBus(device / "oled.sock")),
            keypad=MatrixKeypad(gpio, pins),
            lamps=HeaderLamps(gpio, pins),
            buzzer=PwmBuzzer(gpio, pins),
        )

    return build


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["host"]:  # has a command line of its own
        from hwsim.host import server

        sys.exit(server.main(given[1:]))
    if given[:1] == ["stripe"]:
        from hwsim.stripe_double import server as stripe

        sys.exit(stripe.main(given[1:]))
    if given[:1] == ["faults"]:
        from hwsim import faults

        sys.exit(faults.main(given[1:]))
    if given[:1] == ["sdcard"]:
        from hwsim import sdcard

        sys.exit(sdcard.main(given[1:]))
    if given[:1] == ["card"]:
        from hwsim import parts

        sys.exit(parts.card(given[1:]))
    if given[:1] == ["pn532"]:
        from hwsim import parts

        sys.exit(parts.pn532(given[1:]))
    options = parser().parse_args(given)
    sys.exit(options.command(options))


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(
        prog="payterm-sim",
        description="payterm on simulated hardware: a PN532 on a pseudo-terminal, an SSD1306, cards, a host over TLS.",
    )
    root.add_argument("--config", type=Path, default=cli.DEFAULT_CONFIG, help="configuration file of the terminal")
    root.add_argument("--version", action="version", version=f"payterm-sim {VERSION}")
    commands = root.add_subparsers(title="commands", required=True, metavar="COMMAND")
    from hwsim import sales  # it imports this module: the two meet when a command runs

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(command=run)
        return made

    demo = command("demo", _demo, "a play of about a minute: sales, a dead network, killed processes, balanced books")
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the account of it")
    demo.add_argument("--screens", type=Path, default=Path("demo/screens"), help="where the screens go as PNG")

    world = command("world", _world, "make an installation to play with: keys, cards, a host, a configuration")
    world.add_argument("directory", type=Path, help="a new directory")
    world.add_argument("--port", type=int, default=8443, help="where its host will listen (default: %(default)s)")

    run = command("run", _run, "the terminal service on a simulated device")
    run.add_argument("--device", type=Path, required=True, help="directory of a running `payterm-sim device`")

    device = command("device", _device, "reader, cards and panel, in a process of their own")
    device.add_argument("--directory", type=Path, required=True, help="holds cards/, takes the sockets")

    commands.add_parser("host", help="the operator's host: HTTPS, books, signed answers", add_help=False)

    commands.add_parser("stripe", help="a double of Stripe's payment records, strict and durable", add_help=False)

    commands.add_parser("faults", help="a bad network in front of a host, by seed or by order", add_help=False)

    sales.add_parser(commands)

    commands.add_parser("card", help="a payment card that answers APDUs in hex", add_help=False)

    commands.add_parser("pn532", help="the contactless reader on a pseudo-terminal", add_help=False)

    commands.add_parser("sdcard", help="power cuts on a simulated SD card, for any program", add_help=False)

    present = command("present", _present, "put a card into the field of a running device")
    present.add_argument("card", help="its name in the rack")
    present.add_argument("--device", type=Path, required=True, help="directory of the device")

    remove = command("remove", _remove, "take all cards out of the field")
    remove.add_argument("--device", type=Path, required=True, help="directory of the device")

    screen = command("screen", _screen, "draw what the panel of a running device shows")
    screen.add_argument("--device", type=Path, required=True, help="directory of the device")
    return root


def _demo(options: argparse.Namespace) -> int:
    from hwsim import demo

    return demo.main(screens=options.screens, json_file=options.json)


def _world(options: argparse.Namespace) -> int:
    from hwsim.world import World

    directory = options.directory.absolute()
    if directory.exists():
        print(f"payterm-sim: {directory} is there already and was left as it is: name a new directory", file=sys.stderr)
        return 2
    World(directory).provision(f"https://127.0.0.1:{options.port}", {})
    print(f"made {directory}: configuration in payterm.toml, cards in device/cards, the host's books in host")
    return 0


def _run(options: argparse.Namespace) -> int:
    return cli.main(["--config", str(options.config), "run"], hardware(options.device.absolute()), prog="payterm-sim")


def _device(options: argparse.Namespace) -> int:
    from hwsim.device import Device

    with cli.stop_on_signals() as stop:
        Device(options.directory.absolute()).serve(stop)
    return 0


def _present(options: argparse.Namespace) -> int:
    from hwsim.device import DeviceClient

    DeviceClient(options.device).present(options.card)
    return 0


def _remove(options: argparse.Namespace) -> int:
    from hwsim.device import DeviceClient

    DeviceClient(options.device).remove()
    return 0


def _screen(options: argparse.Namespace) -> int:
    from hwsim.console import draw
    from hwsim.device import DeviceClient

    pictures = DeviceClient(options.device).pictures()
    if pictures:
        print(draw(pictures[-1].image))
    return 0


if __name__ == "__main__":
    main()
