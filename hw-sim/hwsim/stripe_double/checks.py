"""Whether a request's parameters are what the API takes: form encoding in, plain values out.

The shapes come from the official library's own types, with every freedom taken away that they leave: unknown members
are errors at every depth, and where a list of values is documented only these pass. What types cannot say (money is
positive, metadata is short, an outcome brings its own details) stands below them.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NotRequired, Union, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl

import pydantic
import stripe
from pydantic import ConfigDict, TypeAdapter
from stripe import RequestOptions
from typing_extensions import TypedDict, is_typeddict

PARAMS_MAX: Final = 1_000  # of one request; a payment record with full metadata has about 130
_METADATA_MAX, _METADATA_KEY_MAX, _METADATA_VALUE_MAX = 50, 40, 500
_TIME_MAX_S: Final = 4_102_444_800  # the year 2100: milliseconds given for seconds lie far beyond

_PART: Final = re.compile(r"\[([^\[\]]*)\]", re.ASCII)
_NAME: Final = re.compile(r"(?P<name>[^\[\]]+)(?P<rest>(?:\[[^\[\]]*\])*)", re.ASCII)
_OPTIONS: Final = frozenset(RequestOptions.__annotations__)  # of the library, never sent as parameters


class InvalidParam(Exception):
    """A parameter that the API does not take."""

    def __init__(self, param: str, code: str, message: str) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def parse_form(text: str) -> dict[str, Any]:
    """`a[b]=1&c[0]=2` as `{"a": {"b": "1"}, "c": ["2"]}`. Raises `InvalidParam`."""
    root: dict[str, Any] = {}
    try:
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text), max_num_fields=PARAMS_MAX)
    except ValueError as error:
        raise InvalidParam("", "parameter_invalid", "The parameters are no form encoding") from error
    for name, value in pairs:
        match = _NAME.fullmatch(name)
        if match is None:
            raise InvalidParam(name, "parameter_unknown", f"Received unknown parameter: {name}")
        *above, last = [match["name"], *_PART.findall(match["rest"])]
        place = root
        for step in above:
            place = place.setdefault(step, {})
            if not isinstance(place, dict):
                raise InvalidParam(name, "parameter_invalid", f"{name} is given twice")
        if last in place:
            raise InvalidParam(name, "parameter_invalid", f"{name} is given twice")
        place[last] = value
    return {name: _lists(value) for name, value in root.items()}


def _lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {name: _lists(member) for name, member in value.items()}
    if list(inner) == [str(number) for number in range(len(inner))]:
        return list(inner.values())
    return inner


# Called for types made at run time, of which a type checker knows nothing.
_typed_dict: Final[Callable[[str, dict[str, Any]], Any]] = TypedDict  # type: ignore[assignment]


def _strict(hint: Any) -> Any:
    """The same type, copied without its freedoms."""
    if is_typeddict(hint):
        # Two names in the library's options cannot be resolved from here; options are no parameters.
        hints = get_type_hints(hint, localns={"Mapping": Mapping, "StripeContext": object}, include_extras=True)
        copy = _typed_dict(hint.__name__, {name: _strict(kind) for name, kind in hints.items() if name not in _OPTIONS})
        copy.__pydantic_config__ = ConfigDict(extra="forbid")
        return copy
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is NotRequired:
        return NotRequired[_strict(arguments[0])]
    if origin in {Union, types.UnionType}:
        literals = [kind for kind in arguments if get_origin(kind) is Literal]
        plain = [kind for kind in arguments if kind in {str, int} or get_origin(kind) in {dict, list}]
        kept = [*literals, *(kind for kind in plain if not (literals and kind is str))]
        return Union[tuple(_strict(kind) for kind in kept)]  # noqa: UP007 - made at run time
    return hint


# The library leaves the shapes of paths open: these are the calls that the double knows.
REPORT: Final = "report_payment"
SHAPES: Final[Mapping[str, TypeAdapter[dict[str, Any]]]] = {
    name: TypeAdapter(_strict(kind))
    for name, kind in {
        REPORT: stripe.params.PaymentRecordReportPaymentParams,
        "report_payment_attempt_guaranteed": stripe.params.PaymentRecordReportPaymentAttemptGuaranteedParams,
        "report_payment_attempt_failed": stripe.params.PaymentRecordReportPaymentAttemptFailedParams,
        "report_payment_attempt_canceled": stripe.params.PaymentRecordReportPaymentAttemptCanceledParams,
        "report_refund": stripe.params.PaymentRecordReportRefundParams,
        "list": stripe.params.PaymentRecordListParams,
        "retrieve": stripe.params.PaymentRecordRetrieveParams,
    }.items()
}


def check(call: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as values of their types. Raises `InvalidParam`."""
    try:
        checked = SHAPES[call].validate_python(params)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = [str(part) for part in first["loc"] if not _is_type_name(part)]
        param = place[0] + "".join(f"[{part}]" for part in place[1:])
        code = {"extra_forbidden": "parameter_unknown", "missing": "parameter_missing"}.get(
            first["type"], "parameter_invalid"
        )
        raise InvalidParam(param, code, f"{param}: {first['msg']}") from error
    _check_values("", checked)
    _check_metadata(checked.get("metadata"))
    for outcome in ("guaranteed", "failed", "canceled", "refunded"):
        if (checked.get("outcome") == outcome) != (outcome in checked):
            raise InvalidParam(outcome, "parameter_invalid", f"{outcome} belongs to the outcome {outcome}")
    for details in ("processor_details", "payment_method_details"):
        if details in checked and "custom" not in checked[details]:
            raise InvalidParam(f"{details}[custom]", "parameter_missing", f"{details} needs its custom hash")
    return checked


def _is_type_name(part: int | str) -> bool:
    """Pydantic names the alternative of a union among the places."""
    return isinstance(part, str) and not re.fullmatch(r"[a-z_]+[0-9]?", part)


def _check_values(above: str, value: Any) -> None:
    if not isinstance(value, dict):
        return
    for name, member in value.items():
        place = f"{above}[{name}]" if above else name
        if place == "metadata":  # the sender's own words
            continue
        if name.endswith("_at") and not 0 < member < _TIME_MAX_S:
            raise InvalidParam(place, "parameter_invalid", f"{place} is no time in seconds")
        if name == "value" and not 0 < member < 10**12:
            raise InvalidParam(place, "parameter_invalid", f"{place} is no positive amount")
        if name == "currency" and not re.fullmatch(r"[a-z]{3}", member):
            raise InvalidParam(place, "parameter_invalid", f"{place} is no currency in lower case")
        if name == "limit" and not 1 <= member <= 100:
            raise InvalidParam(place, "parameter_invalid", f"{place} is not between 1 and 100")
        _check_values(place, member)


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict):
        return
    if len(metadata) > _METADATA_MAX:
        raise InvalidParam("metadata", "parameter_invalid", f"metadata has more than {_METADATA_MAX} keys")
    for key, value in metadata.items():
        if len(key) > _METADATA_KEY_MAX or len(value) > _METADATA_VALUE_MAX:
            raise InvalidParam(f"metadata[{key[:40]}]", "parameter_invalid", "metadata keys or values are too long")
