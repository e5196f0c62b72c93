"""What the operator's host says of this terminal itself: whether it is revoked, its configuration, its certificate.

Sync carries the questions and answers, here they are signed and believed. A sync service in an attacker's hands can
hold back that a terminal is revoked; it cannot make it so, nor put an older word in the place of a newer one.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from typing import Annotated, Any, Final
from uuid import UUID

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from terminal.clock import Clock, Entropy
from terminal.control import Call, CallRefused, Role
from terminal.ledger.errors import AnswerRejected
from terminal.ledger.ledger import Ledger
from terminal.ledger.sealing import Envelopes, digest, verify_certificate, verify_terminal_status
from terminal.ledger.values import HostStatus
from terminal.records import said

CSR_CHARACTERS_MAX: Final = 8_192  # what a host takes (docs/host-api.yaml)
_REQUESTS_MAX: Final = 16  # unanswered; older ones are forgotten, and their answers refused

_SYNC: Final = frozenset({Role.SYNC})
_Answer = Annotated[str, msgspec.Meta(max_length=16_384)]
_log = logging.getLogger(__name__)


class _Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Request(_Arguments, frozen=True):
    csr: Annotated[str, msgspec.Meta(min_length=1, max_length=CSR_CHARACTERS_MAX, pattern=r"\A[\x20-\x7e\n]+\Z")]


class Issued(_Arguments, frozen=True):
    id: UUID
    answer: _Answer


class Told(_Arguments, frozen=True):
    answer: _Answer


class Registration:
    """The handlers, bound to one open ledger."""

    def __init__(
        self, ledger: Ledger, envelopes: Envelopes, answer_key: Ed25519PublicKey, clock: Clock, entropy: Entropy
    ) -> None:
        self._ledger = ledger
        self._envelopes = envelopes
        self._answer_key = answer_key
        self._clock = clock
        self._entropy = entropy
        self._asked: OrderedDict[UUID, str] = OrderedDict()
        self._newest_ms = 0  # of what the host has said, by its own clock

    def calls(self) -> Mapping[str, Call]:
        return {
            "certificate.request": Call(Request, said(self._request), _SYNC),
            "certificate.issued": Call(Issued, said(self._issued), _SYNC),
            "terminal.told": Call(Told, said(self._told), _SYNC),
        }

    def _request(self, arguments: Request) -> dict[str, Any]:
        """Sign a request for a client certificate: the signature proves to the host who asks."""
        id_ = UUID(bytes=self._entropy(16), version=4)
        jws = self._envelopes.certificate(id_, csr=arguments.csr, asked_at_ms=self._clock.wall_ms())
        self._asked[id_] = digest(jws)
        while len(self._asked) > _REQUESTS_MAX:
            self._asked.popitem(last=False)
        return {"id": str(id_), "envelope": jws}

    def _issued(self, arguments: Issued) -> dict[str, Any]:
        """The certificates in an answer, the terminal's own first; or why the host issues none."""
        envelope = self._asked.get(arguments.id)
        if envelope is None:
            raise CallRefused("no_such_request", "this certificate was not asked for, or too long ago: ask again")
        try:
            issued = verify_certificate(
                arguments.answer,
                self._answer_key,
                id_=arguments.id,
                terminal=self._envelopes.terminal,
                envelope=envelope,
            )
        except AnswerRejected as error:
            raise CallRefused("answer_rejected", str(error)) from error
        del self._asked[arguments.id]
        self._ledger.note("certificate", decision=issued.decision, reason=issued.reason)
        return {"chain": issued.chain, "reason": issued.reason}

    def _told(self, arguments: Told) -> dict[str, Any]:
        """Take the host's newest word on this terminal; durable before it has any effect."""
        try:
            told = verify_terminal_status(arguments.answer, self._answer_key, terminal=self._envelopes.terminal)
        except AnswerRejected as error:
            raise CallRefused("answer_rejected", str(error)) from error
        known = self._ledger.host_status
        newest_ms = max(self._newest_ms, 0 if known is None else known.said_at_ms)
        if told.time < newest_ms:
            raise CallRefused("answer_rejected", "the host has said something newer since: this is an old answer")
        self._newest_ms = told.time
        if known is None or (known.revoked, known.configuration) != (told.revoked, told.configuration):
            self._ledger.commit_host_status(HostStatus(told.revoked, told.configuration, told.time))
            if told.revoked:
                _log.error("the operator has revoked this terminal: no sale is taken, what is stored is kept")
            elif known is not None and known.revoked:
                _log.info("the operator has admitted this terminal again")
        return {"revoked": told.revoked, "configuration": told.configuration}
