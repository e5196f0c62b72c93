"""CA public keys that schemes and laboratories have published, as data of this package.

Every key is checked against its checksum whenever it is loaded. Nothing here is trusted by itself: a terminal trusts
what its configuration says. With a test key anybody can make a card that authenticates, so the three files stay apart.
The tables have the shape of `[[ca_keys]]` in the configuration and may be copied there.
"""

from __future__ import annotations

import tomllib
from enum import Enum
from importlib import resources

from terminal.emv.authentication import CaKey, CaKeyError


class Use(Enum):
    """What cards a key is for. Within one use RID and index name one key; across uses they may not."""

    LIVE = "live"  # cards of the public; schemes retire keys, ask the scheme which are in force
    TEST = "test"  # the private keys are known to many
    UNMARKED = "unmarked"  # published without saying which


def published(use: Use = Use.LIVE) -> tuple[CaKey, ...]:
    """The published keys of one use, by RID and index. Raises `CaKeyError` for a file that was altered."""
    text = resources.files(__name__).joinpath(f"{use.value}.toml").read_text(encoding="utf-8")
    try:
        return tuple(
            CaKey(
                rid=bytes.fromhex(key["rid"]),
                index=int(key["index"], 16),
                modulus=bytes.fromhex(key["modulus"]),
                exponent=bytes.fromhex(key["exponent"]),
                checksum=bytes.fromhex(key["checksum"]) if "checksum" in key else None,
            )
            for key in tomllib.loads(text)["ca_keys"]
        )
    except CaKeyError:
        raise
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise CaKeyError(
            f"the published CA public keys ({use.value}.toml) cannot be read, no card was charged: install it again"
        ) from error
