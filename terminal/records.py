"""Calls about what is stored: listing, audit trail, verification, backup, privacy (docs/formats.md, Local socket).

They need nothing but the ledger. So the running terminal answers them on its socket, and a command answers them by
itself when no terminal runs. What may take long comes in pieces, each a call of its own: selling goes on in between.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from terminal.config import Config
from terminal.control import CALLER, Call, CallRefused, Role
from terminal.ledger.errors import LedgerError
from terminal.ledger.journal import Position, Record, RecordType
from terminal.ledger.ledger import Ledger
from terminal.ledger.values import Transaction

LIST_MAX: Final = 100  # transactions in one answer: it stays within one line of the socket
AUDIT_MAX: Final = 50  # records in one answer, for the same reason
_WAIT_MS_MAX: Final = 600_000  # a client's patience; the server does not look at it

_OPERATOR: Final = frozenset({Role.OPERATOR})
_CardRef = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
# What the trail shows of each body. Nothing of these is card data, and no envelope is among them.
_SHOWN: Final = (
    "number", "kind", "amount", "currency", "reference", "decision", "reason", "scheme", "event", "screen",
    "checkpoint", "epoch_of", "sha256",
)  # fmt: skip


class _Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class List(_Arguments, frozen=True):
    limit: Annotated[int, msgspec.Meta(ge=1, le=LIST_MAX)] = LIST_MAX
    before: int | None = None


class Page(_Arguments, frozen=True):
    after: Annotated[int, msgspec.Meta(ge=0)] | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=AUDIT_MAX)] = AUDIT_MAX


class Place(_Arguments, frozen=True):
    sequence: Annotated[int, msgspec.Meta(ge=0)]
    mac: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class Verify(_Arguments, frozen=True):
    after: Place | None = None


class Long(_Arguments, frozen=True):
    wait_ms: Annotated[int, msgspec.Meta(ge=0, le=_WAIT_MS_MAX)] = 0


class Backup(_Arguments, frozen=True):
    path: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
    wait_ms: Annotated[int, msgspec.Meta(ge=0, le=_WAIT_MS_MAX)] = 0


class OfCard(_Arguments, frozen=True):
    card_ref: _CardRef


class Records:
    """The handlers, bound to one open ledger."""

    def __init__(self, config: Config, ledger: Ledger) -> None:
        self._config = config
        self._ledger = ledger

    def calls(self) -> Mapping[str, Call]:
        return {
            "ledger.list": Call(List, said(self._list), _OPERATOR),
            "ledger.check": Call(Long, said(self._check), _OPERATOR),
            "ledger.backup": Call(Backup, said(self._backup), _OPERATOR),
            "audit.page": Call(Page, said(self._page), _OPERATOR),
            "audit.verify": Call(Verify, said(self._verify), _OPERATOR),
            "keys.use": Call(Long, said(self._use), _OPERATOR),
            "privacy.export": Call(OfCard, said(self._export), _OPERATOR),
            "privacy.erase": Call(OfCard, said(self._erase), _OPERATOR),
        }

    def _list(self, arguments: List) -> dict[str, Any]:
        found = self._ledger.transactions(arguments.limit, arguments.before)
        return {"transactions": [view(transaction) for transaction in found]}

    def _check(self, _: Long) -> dict[str, Any]:
        health = self._ledger.inspection.check()
        return msgspec.to_builtins(health)  # type: ignore[no-any-return]

    def _backup(self, arguments: Backup) -> dict[str, Any]:
        self._note("backup")
        made = self._ledger.inspection.write_backup(Path(arguments.path))
        return {"path": arguments.path, "records": made.records, "keys_needed": made.keys_needed}

    def _page(self, arguments: Page) -> dict[str, Any]:
        last = self._ledger.inspection.last
        after = max(0, last - arguments.limit) if arguments.after is None else arguments.after
        return {
            "records": [told(record) for record in self._ledger.inspection.records(after, arguments.limit)],
            "last": last,
        }

    def _verify(self, arguments: Verify) -> dict[str, Any]:
        after = arguments.after
        start = None if after is None else Position(after.sequence, bytes.fromhex(after.mac))
        step = self._ledger.inspection.verify_some(start)
        return {
            "position": {"sequence": step.position.sequence, "mac": step.position.mac.hex()},
            "first": step.first,
            "last": step.last,
            "records": step.records,
            "checkpoints": step.checkpoints,
            "restored": list(step.restored),
            "first_bad": step.first_bad,
            "countersigned": step.countersigned,
            "done": step.done,
        }

    def _use(self, _: Long) -> dict[str, Any]:
        use = self._ledger.inspection.key_use()
        return {name: {id_.hex(): count for id_, count in counts.items()} for name, counts in use.items()} | {
            "current": self._ledger.inspection.current_key.hex()
        }

    def _export(self, arguments: OfCard) -> dict[str, Any]:
        self._note("privacy_export")
        found = self._ledger.upkeep.of_card(arguments.card_ref)
        return {
            "card_ref": arguments.card_ref,
            "terminal": self._config.terminal.id,
            "transactions": [view(each) | {"card": msgspec.to_builtins(each.card), "rrn": each.rrn} for each in found],
        }

    def _erase(self, arguments: OfCard) -> dict[str, Any]:
        self._note("privacy_erase")
        erased, kept = self._ledger.upkeep.erase_card(arguments.card_ref)
        return {"erased": erased, "kept": kept}

    def _note(self, what: str) -> None:
        """Who did it (PCI DSS 4.0.1, 10.2.2): a user id, by the kernel's word."""
        uid = CALLER.get()
        self._ledger.note(what, uid=os.getuid() if uid is None else uid)


def said(handler: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """The ledger's refusals, in the socket's words."""

    def handle(arguments: Any) -> dict[str, Any]:
        try:
            return handler(arguments)
        except LedgerError as error:
            raise CallRefused("ledger", str(error)) from error

    return handle


def told(record: Record) -> dict[str, Any]:
    """A record as the audit trail shows it."""
    body = record.body
    details = {name: body[name] for name in _SHOWN if body.get(name) is not None}
    if record.type is RecordType.EVENT:
        details = {"what": body["what"], **body["details"]}
    return {
        "sequence": record.sequence,
        "type": record.type.name,
        "epoch": record.epoch,
        "boot": str(record.boot_id),
        "monotonic_ms": record.monotonic_ms,
        "wall_ms": record.wall_ms,
        "synchronised": record.synchronised,
        "transaction": body.get("transaction"),
        "details": details,
    }


def view(transaction: Transaction) -> dict[str, Any]:
    """A transaction as commands and register software see it. No card data beyond what a receipt prints."""
    card = transaction.card
    return {
        "id": str(transaction.id),
        "sequence": transaction.number,
        "kind": transaction.kind,
        "state": transaction.state.value,
        "reason": transaction.reason,
        "amount_minor": transaction.amount.minor,
        "currency": transaction.amount.currency.code,
        "reference": transaction.reference,
        "opened_at_ms": transaction.opened_at_ms,
        "time_known": transaction.clock_synchronised or transaction.corrected,
        "scheme": transaction.scheme,
        "last4": card.last4 if card else None,
        "authorisation_code": transaction.authorisation_code,
        "of": None if transaction.of is None else str(transaction.of),
    }
