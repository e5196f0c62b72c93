"""Simulated cards: what stands behind the antenna.

`personalise` makes a card file, `visa` answers command APDUs from it, `iso14443` carries them through ISO-DEP blocks.
Nothing here imports the terminal: a card that shares the kernel's code shares its mistakes.
"""
