"""Does a checkpoint fit what this terminal has shown before?

A terminal's journal only grows: records have rising numbers, each with one MAC, in epochs that each continue one place
of an earlier one. A checkpoint that contradicts this was signed over another history: the terminal's store was put back
to an earlier state, or copied, and two stores now sign for one terminal. That is a fork, and a person has to look.

Checkpoints may arrive in any order, since each is sent until it is answered. So they are compared in the order in which
the terminal made them, which is that of their envelope numbers. Numbers that are missing contradict nothing.
"""

from __future__ import annotations

from hwsim.host.messages import Checkpoint
from hwsim.host.store import Store


def contradiction(checkpoint: Checkpoint, kid: str, store: Store) -> str | None:
    """What is wrong with it, for people; None if it fits. `kid` is the key that signed it."""
    return _of_epoch(checkpoint, kid, store) or _of_growth(checkpoint, store)


def _of_epoch(checkpoint: Checkpoint, kid: str, store: Store) -> str | None:
    """An epoch is registered by its first checkpoint, and every later one must name the same beginning."""
    terminal, of = checkpoint.terminal, checkpoint.epoch_of
    known = store.epoch(terminal, checkpoint.epoch)
    if known is not None:
        return None if known.epoch_of == of else f"epoch {known.epoch} began elsewhere, by an earlier checkpoint"
    if of is not None:
        continued = store.checkpoint_at(terminal, of.epoch, of.sequence)
        if continued is not None and continued.mac != of.mac:
            return f"it continues another record {of.sequence} of epoch {of.epoch} than the one that was shown"
    # A signing key that is new here was registered by a person, after a reset or a replacement: it may begin anew.
    if not store.epochs_under(terminal, kid):
        return None
    if of is None:
        return f"epoch {checkpoint.epoch} continues nothing, although this terminal has recorded before"
    for other in store.successors(terminal, of.epoch):
        return f"epoch {of.epoch} is continued by epoch {other.epoch} already"
    return None


def _of_growth(checkpoint: Checkpoint, store: Store) -> str | None:
    """Later envelopes are about the same or later records; a record has one MAC; a continued epoch has ended."""
    terminal, epoch, sequence = checkpoint.terminal, checkpoint.epoch, checkpoint.sequence
    same = store.checkpoint_at(terminal, epoch, sequence)
    if same is not None and same.mac != checkpoint.mac:
        return f"record {sequence} was shown with another MAC"
    before = store.checkpoint_before(terminal, epoch, checkpoint.number)
    if before is not None and before.sequence > sequence:
        return f"the journal had come to record {before.sequence} before, and is now at {sequence}"
    after = store.checkpoint_after(terminal, epoch, checkpoint.number)
    if after is not None and after.sequence < sequence:
        return f"the journal came to record {after.sequence} later, and was already at {sequence}"
    for successor in store.successors(terminal, epoch):
        if successor.epoch_of is not None and successor.epoch_of.sequence < sequence:
            return f"epoch {successor.epoch} continues this one at record {successor.epoch_of.sequence}, yet it went on"
    return None
