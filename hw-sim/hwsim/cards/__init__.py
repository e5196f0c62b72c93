"""Simulated cards: what stands behind the antenna and the contacts.

A design (`profiles/*.toml`) says what kind of card it is, `bureau` vouches for it, `personalise` makes a card file of
both. `visa` and `mastercard` are contactless applications, `contact` the one behind the contacts, `card` both on one
chip; `iso14443` carries contactless commands through ISO-DEP blocks.
Nothing here imports the terminal: a card that shares the kernel's code shares its mistakes.
"""
