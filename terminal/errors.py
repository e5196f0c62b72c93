"""The root of what a person may be told. Every message says what happened, what it means for the money, what to do."""

from __future__ import annotations

from typing import ClassVar


class TerminalError(Exception):
    """Something that a person or a script can act on. Commands end with `exit_code` and the message, no traceback."""

    exit_code: ClassVar[int] = 1
