"""A simulated SD card, whose power can be cut at any moment.

A program is recorded once: every write and flush that reaches the card, and every promise that the program makes, in
one order (`card`, on a real ext4 of the kernel; `files`, without root, by its system calls). From the recording any
number of crash states is made (`cuts`), and each is switched on again: does the program still keep what it had promised
(`campaign`)? It knows nothing of payments: bring your own program and your own checker.

What it does not prove: a real card may lie about a flush. Garbage, collateral and nobarrier are models of that.
"""

from hwsim.sdcard.campaign import Found, Judge, Remark, Tally, Verdict
from hwsim.sdcard.card import CardUnavailable, unavailable
from hwsim.sdcard.command import main
from hwsim.sdcard.cuts import MODES, Cut, Mode
from hwsim.sdcard.recording import Recording, choose

__all__ = [
    "MODES",
    "CardUnavailable",
    "Cut",
    "Found",
    "Judge",
    "Mode",
    "Recording",
    "Remark",
    "Tally",
    "Verdict",
    "choose",
    "main",
    "unavailable",
]
