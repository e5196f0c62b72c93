"""The commands of `payterm` that look at, check, copy or erase what is stored, one module for each group.

Each module has `add`, which puts its commands into the command line. A command imports what it needs when it runs.
"""
