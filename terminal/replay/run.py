"""A replay file, run: the kernels against the card of the list, and what came of it as one JSON object.

Contact is one conversation, up to the second GENERATE AC if the file has the host's answer. Contactless is one tap, or,
with `kernel_outcomes`, entry point alone: it hands over, is told what the kernel said, and goes on as Book B has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple, overload

from msgspec import UnsetType

from terminal.emv import authentication, contact, entry_point
from terminal.emv.apdu import Exchange
from terminal.emv.authentication import AuthenticationFailed, Trust
from terminal.emv.configuration import Activation, Environment, Request, Setup
from terminal.emv.contact_selection import Candidate
from terminal.emv.outcome import (
    Approved,
    CardRead,
    Declined,
    EndApplication,
    MessageId,
    OdaMethod,
    OdaResult,
    OdaStatus,
    OnlineRequest,
    Outcome,
    SelectNext,
    Status,
    Torn,
    TryAgain,
    TryAnotherInterface,
    UiRequest,
)
from terminal.emv.progress import Listed, Step, View, Watch
from terminal.emv.tags import Tag
from terminal.emv.transaction import Transaction
from terminal.replay import formats, masking, settings
from terminal.replay.formats import UnusableFile
from terminal.replay.script import Mismatch, ScriptedCard

_READY: Final = UiRequest(MessageId.PRESENT_CARD, Status.READY_TO_READ)
_FIELD_ON, _FIELD_OFF = "field_on", "field_off"
RECOVERED: Final = (
    "issuer_modulus",
    "icc_modulus",
    "data_authentication_code",
    "icc_dynamic_number",
    "cid",
    "cryptogram",
)
_SELECTED: Final = "9000"  # entry point hands over after no other


class _Stopped(Exception):
    """The step that the file wants to stop after is done."""


def replay(file: formats.ReplayFile, *, show_pan: bool = False) -> dict[str, Any]:
    """Run a file; the documentation says what the keys of the answer mean. Raises `UnusableFile`."""
    run = _Run(file, show_pan=show_pan)
    result, mismatch = _Result(), None
    try:
        result = run.contact() if file.interface == "contact" else run.contactless()
        run.card.finish()
    except _Stopped:
        pass
    except Mismatch as different:
        mismatch = {"index": different.index, "expected": _hex(different.expected), "got": _hex(different.got)}
    return run.answer(result) | {"mismatch": mismatch}


class _Result(NamedTuple):
    """How a run ended, in the words of the answer; `outcome` where a kernel of ours said so."""

    name: str | None = None
    reason: str | None = None
    outcome: Outcome | None = None

    @classmethod
    def of(cls, outcome: Outcome) -> _Result:
        match outcome:
            case Approved():
                name = "approved"
            case OnlineRequest():
                name = "online_request"
            case Declined():
                name = "declined"
            case TryAgain():
                name = "try_again"
            case SelectNext():
                name = "select_next"
            case TryAnotherInterface():
                name = "try_another_interface"
            case EndApplication():
                name = "end_application"
            case Torn():
                name = "torn"
        return cls(name, None if isinstance(outcome, Approved | OnlineRequest) else outcome.reason, outcome)


class _Run:
    """One run, and what was seen of it."""

    def __init__(self, file: formats.ReplayFile, *, show_pan: bool) -> None:
        self._file = file
        self._show_pan = show_pan
        self._setup = settings.setup(file)
        self._request = settings.replay_request(file)
        self.card = ScriptedCard(
            file.exchanges, in_order=file.order == "strict", unknown_command=bytes.fromhex(file.unknown_command)
        )
        self._until = Step(file.until) if file.until is not None else None
        self._candidates: Sequence[Listed] = ()
        self._view: View | None = None
        self._handovers: list[dict[str, Any]] = []
        self._ui: list[Any] = []
        self._cardholder = _Cardholder(file.choices)
        self._environment = Environment(
            unpredictable_number=settings.in_order(file.unpredictable_numbers),
            notify=lambda ui: self._ui.append(_ui(ui)),
            random_percent=settings.random_percent(file.random),
            earlier_minor=settings.earlier_minor(file.log),
            watch=Watch(self._listed, self._reached),
        )

    def _listed(self, candidates: Sequence[Listed]) -> None:
        self._candidates = candidates
        if self._until is Step.CANDIDATE_LIST:
            raise _Stopped

    def _reached(self, step: Step, view: View) -> None:
        self._view = view
        if step is self._until:
            raise _Stopped

    # Contact

    def contact(self) -> _Result:
        """Raises `Mismatch`, `_Stopped`, `UnusableFile`."""
        line, host = self.card.line(), self._file.host
        outcome = self.card.pump(
            contact.run(self._setup, self._request, self._environment, self._cardholder.choose, line)
        )
        if isinstance(host, UnsetType) and self.card.expects_more:
            host = None  # not said, but the list goes on: what follows an online request without an answer
        if isinstance(outcome, OnlineRequest) and outcome.resume and not isinstance(host, UnsetType):
            outcome = self.card.pump(outcome.resume(settings.issuer_answer(host) if host is not None else None))
        if isinstance(outcome, EndApplication) and self._cardholder.gave_up:
            outcome = EndApplication("not_confirmed", outcome.ui)
        self._show(outcome)
        return _Result.of(outcome)

    # Contactless

    def contactless(self) -> _Result:
        """Raises `Mismatch`, `_Stopped`, `UnusableFile`."""
        refusal = entry_point.preprocess(self._setup, self._request)
        if isinstance(refusal, TryAnotherInterface):
            self._show(refusal)
            return _Result.of(refusal)
        if self._file.kernel_outcomes is not None:
            return self._entry_point_alone(_Kernels(self._file.kernel_outcomes, self._handovers, self._ui))
        ui = _READY
        while True:  # each round takes at least one exchange of the list
            outcome = self._tap(ui, entry_point.KERNELS)
            self._show(outcome)
            self._ui.append(_FIELD_OFF)
            restart = outcome.restart if isinstance(outcome, TryAgain | EndApplication | Torn) else None
            if restart is None or not self.card.expects_more:
                return _Result.of(outcome)
            ui = restart

    def _entry_point_alone(self, kernels: _Kernels) -> _Result:
        """Starts A to D, with kernels that only say what the file says."""
        restart: UiRequest | formats.Ui = _READY
        while True:  # each round takes an outcome or an exchange of the list
            outcome = self._tap(restart, kernels)
            said = kernels.said
            if said is None:  # no kernel had the last word
                self._show(outcome)
                result, again = _Result.of(outcome), isinstance(outcome, TryAgain)
            else:
                result, again = _Result(said.outcome), _start(said) is not None
            self._ui.append(_FIELD_OFF)
            if not again or not (kernels.left or self.card.expects_more):
                return result
            restart = (said.ui_on_restart if said is not None else None) or _READY

    def _tap(self, ui: UiRequest | formats.Ui, kernels: Mapping[int, entry_point.Kernel]) -> Outcome:
        """Start B: ask for the card, switch the field on (Book B, 3.2); then selection and kernel."""
        self._ui += [_ui(ui), _FIELD_ON]
        self.card.present()
        return self.card.pump(entry_point.run(self._setup, self._request, self._environment, kernels))

    def _show(self, outcome: Outcome) -> None:
        if not isinstance(outcome, SelectNext):
            self._ui.append(_ui(outcome.ui))

    # The answer

    def answer(self, result: _Result) -> dict[str, Any]:
        view = self._view
        objects: Mapping[int, bytes] = {} if view is None else {**view.card, **view.terminal}
        oda = _oda(result.outcome, view)
        if self._file.masked and oda.status is not OdaStatus.OK:
            oda = OdaResult(reason="masked")  # without the card's number no certificate of it can be right
        asked = view.asked if isinstance(view, Transaction) else None
        return {
            "outcome": result.name,
            "reason": result.reason,
            "aid": _hex(view.activation.adf_name) if view is not None else None,
            "kernel": _kernel(view.kernel) if view is not None and self._file.interface == "contactless" else None,
            "oda": {
                "method": oda.method.value if oda.method else None,
                "result": oda.status.value,
                "reason": oda.reason,
                "recovered": self._recovered(oda),
            },
            "tvr": _hex(objects.get(Tag.TVR)),
            "tsi": _hex(objects.get(Tag.TSI)),
            "cvm_results": _hex(objects.get(Tag.CVM_RESULTS)),
            "cid": _hex(objects.get(Tag.CRYPTOGRAM_INFORMATION)),
            "cryptogram": _hex(objects.get(Tag.CRYPTOGRAM)),
            "decision": asked.name if asked is not None else None,
            "candidates": [_candidate(each) for each in self._candidates],
            "handovers": self._handovers,
            "ui": self._ui,
            "cardholder_choices": self._cardholder.asked,
            "tags": {
                f"{tag:02X}": value.hex().upper() if self._show_pan else masking.shown(tag, value)
                for tag, value in sorted(objects.items())
            },
            "commands": [_hex(command) for command in self.card.commands],
        }

    def _recovered(self, oda: OdaResult) -> dict[str, str | None]:
        view = self._view
        if view is None or oda.method is None:
            return recovered({}, b"", None, self._setup.trust(self._request), None)
        records = view.records if isinstance(view, Transaction) else None
        method = oda.method if oda.status is OdaStatus.OK else None
        rid = view.activation.adf_name[: authentication.RID_BYTES]
        return recovered(view.card, rid, records, self._setup.trust(self._request), method)


class _Cardholder:
    """Answers what the terminal asks the cardholder (Book 1, 12.4), and keeps the questions."""

    def __init__(self, choices: Sequence[bool | str] | None) -> None:
        self._left = list(choices) if choices is not None else []
        self.asked: list[dict[str, Any]] = []
        self.gave_up = False  # the last application was not agreed to

    def choose(self, remaining: Sequence[Candidate]) -> Candidate | None:
        """An application from the list, or the best one that may be used. Raises `UnusableFile`."""
        if len(remaining) > 1 and not (self._left and isinstance(self._left[0], bool)):
            self.asked.append({"choose": [_hex(candidate.adf_name) for candidate in remaining]})
            if self._left and isinstance(name := self._left.pop(0), str):
                return self._named(name, remaining)  # who picks an application need not confirm it
        for candidate in remaining:
            if not candidate.confirm or self._confirmed(candidate):
                return candidate
        self.gave_up = bool(remaining)
        return None

    def _named(self, aid: str, remaining: Sequence[Candidate]) -> Candidate:
        name = bytes.fromhex(aid)
        exactly = (each for each in remaining if each.adf_name == name)
        found = next(exactly, None) or next((each for each in remaining if each.adf_name.startswith(name)), None)
        if found is None:
            raise UnusableFile(f"choices: {aid} is not among the applications that are left; correct the file.")
        return found

    def _confirmed(self, candidate: Candidate) -> bool:
        self.asked.append({"confirm": _hex(candidate.adf_name)})
        answer = self._left.pop(0) if self._left else True
        return answer if isinstance(answer, bool) else candidate.adf_name.startswith(bytes.fromhex(answer))


class _Kernels(Mapping[int, entry_point.Kernel]):
    """Any kernel that is asked for: it notes what it was handed, and says what the file says that it did."""

    def __init__(
        self, outcomes: Sequence[formats.KernelOutcome], handovers: list[dict[str, Any]], ui: list[Any]
    ) -> None:
        self.left = list(outcomes)
        self.said: formats.KernelOutcome | None = None  # None: entry point has gone on to the next candidate
        self._handovers = handovers
        self._ui = ui

    def __getitem__(self, number: int) -> entry_point.Kernel:
        return self._run

    def __contains__(self, number: object) -> bool:
        return True

    def __iter__(self) -> Iterator[int]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def _run(
        self, setup: Setup, request: Request, environment: Environment, activation: Activation
    ) -> Exchange[Outcome]:
        yield from ()  # a kernel is a generator, and this one asks its card nothing
        while True:
            self._handovers.append(_handover(activation))
            if not self.left:
                raise UnusableFile("kernel_outcomes: entry point hands over once more than the list has outcomes")
            said = self.left.pop(0)
            self._ui += [_ui(each) for each in said.ui]
            match _start(said):
                case "C":
                    self.said = None
                    return SelectNext("kernel_outcome")
                case "D" if self.left:
                    self._ui += [_ui(said.ui_on_restart)] if said.ui_on_restart else []
                case _:
                    self.said = said
                    return EndApplication("kernel_outcome")  # what it is to be called stands in `said`


def _start(said: formats.KernelOutcome) -> str | None:
    """Where entry point goes on (Book B, 3.5)."""
    return said.start or {"select_next": "C", "try_again": "B"}.get(said.outcome)


def _handover(activation: Activation) -> dict[str, Any]:
    found = activation.indicators
    return {
        "aid": _hex(activation.adf_name),
        "kernel": _kernel(activation.combination.kernel),
        "ttq": _hex(activation.ttq),
        "indicators": {
            "status_check_requested": found.status_check_requested,
            "contactless_not_allowed": found.contactless_not_allowed,
            "zero_amount": found.zero_amount,
            "cvm_required_exceeded": found.cvm_required_exceeded,
            "floor_exceeded": found.floor_exceeded,
        },
        "sw": _SELECTED,
    }


def _oda(outcome: Outcome | None, view: View | None) -> OdaResult:
    """As the kernel left it; a kernel that ended early may have no card to say it with."""
    if isinstance(view, Transaction):
        return view.oda
    card = getattr(outcome, "card", None)
    return card.oda if isinstance(card, CardRead) else OdaResult()


def recovered(
    card: Mapping[int, bytes], rid: bytes, records: bytes | None, trust: Trust, succeeded: OdaMethod | None
) -> dict[str, str | None]:
    """What certificates and signatures gave, link by link; null from the link on that does not hold."""
    found: dict[str, str | None] = dict.fromkeys(RECOVERED)
    with suppress(AuthenticationFailed):
        found["issuer_modulus"] = _hex(authentication.issuer_key(card, rid, trust).modulus)
        found["icc_modulus"] = _hex(authentication.card_key(card, rid, records, trust).modulus)
    if succeeded is OdaMethod.SDA:
        found["data_authentication_code"] = _hex(card.get(Tag.DATA_AUTHENTICATION_CODE))
    if succeeded in {OdaMethod.DDA, OdaMethod.CDA}:
        found["icc_dynamic_number"] = _hex(card.get(Tag.ICC_DYNAMIC_NUMBER))
    if succeeded is OdaMethod.FDDA:
        found["icc_dynamic_number"] = _hex(card.get(Tag.ATC))
    if succeeded is OdaMethod.CDA:
        found["cid"] = _hex(card.get(Tag.CRYPTOGRAM_INFORMATION))
        found["cryptogram"] = _hex(card.get(Tag.CRYPTOGRAM))
    return found


def _candidate(listed: Listed) -> dict[str, Any]:
    return {
        "aid": _hex(listed.adf_name),
        "label": listed.label.decode("ascii", errors="replace"),
        "priority": listed.priority,
        "confirm": listed.confirm,
        "kernel": None if listed.kernel is None else _kernel(listed.kernel),
    }


def _ui(ui: UiRequest | formats.Ui) -> dict[str, Any]:
    return {
        "message": int(ui.message),
        "status": int(ui.status),
        "hold_ms": ui.hold_ms,
        "language": ui.language if isinstance(ui, formats.Ui) else None,
        "value": ui.value if isinstance(ui, formats.Ui) else ui.balance_minor,
    }


def _kernel(number: int) -> str:
    """A kernel identifier of one byte, or of three."""
    return f"{number:02X}" if number <= 0xFF else f"{number:06X}"


@overload
def _hex(value: bytes) -> str: ...
@overload
def _hex(value: bytes | None) -> str | None: ...
def _hex(value: bytes | None) -> str | None:
    return value.hex().upper() if value is not None else None
