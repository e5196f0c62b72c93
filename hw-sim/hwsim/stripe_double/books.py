"""The double's books: one SQLite file with payment records, saved results and every request that came.

A record and the result that is saved under its idempotency key are written together or not at all. What may happen to a
payment record is the table `_MOVES`. Two reports of one payment make two records, for nothing in Stripe's documentation
says that a reference has to be unique: that is the double booking which a client has to prevent.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

KEYS_LIVE_MS: Final = 24 * 3_600_000  # from the first receipt
LOG_MAX: Final = 100_000  # requests kept, the newest
_SCHEMA_VERSION: Final = 1
_BUSY_MS: Final = 5_000

_SCHEMA: Final = """
CREATE TABLE record (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, created INTEGER NOT NULL, livemode INTEGER NOT NULL,
    state TEXT NOT NULL, reference TEXT, currency TEXT NOT NULL, requested INTEGER NOT NULL,
    refunded INTEGER NOT NULL DEFAULT 0, params TEXT NOT NULL, metadata TEXT NOT NULL
) STRICT;
CREATE TABLE refund (
    reference TEXT NOT NULL, livemode INTEGER NOT NULL, record TEXT NOT NULL, amount INTEGER NOT NULL,
    PRIMARY KEY (reference, livemode)
) STRICT;
CREATE TABLE result (
    key TEXT NOT NULL, livemode INTEGER NOT NULL, first_ms INTEGER NOT NULL, fingerprint TEXT NOT NULL,
    status INTEGER NOT NULL, body TEXT NOT NULL, should_retry TEXT, PRIMARY KEY (key, livemode)
) STRICT;
CREATE TABLE request (
    number INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, method TEXT NOT NULL, path TEXT NOT NULL, headers TEXT NOT NULL,
    body TEXT NOT NULL, idempotency_key TEXT, request_id TEXT NOT NULL, status INTEGER
) STRICT;
CREATE TABLE clock (offset_ms INTEGER NOT NULL) STRICT;
INSERT INTO clock VALUES (0);
"""


class State(Enum):
    """Where the most recent attempt of a payment record stands."""

    OPEN = "open"
    GUARANTEED = "guaranteed"
    FAILED = "failed"
    CANCELED = "canceled"


# A refund needs GUARANTEED and changes no state. Nothing leads out of the other three here: a new attempt would.
_MOVES: Final[Mapping[str, State]] = {
    "report_payment_attempt_guaranteed": State.GUARANTEED,
    "report_payment_attempt_failed": State.FAILED,
    "report_payment_attempt_canceled": State.CANCELED,
}


class Conflict(Exception):
    """The call does not fit the payment record as it stands: nothing was booked."""

    def __init__(self, status: int, code: str | None, param: str | None, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


@dataclass(frozen=True, slots=True)
class Booking:
    """A payment record, as the books have it."""

    id: str
    payment_reference: str | None
    amount: int
    currency: str
    state: State
    refunded: int
    created: int
    livemode: bool
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class Result:
    """What was answered under an idempotency key, and will be again."""

    fingerprint: str
    status: int
    body: str
    should_retry: str | None


@dataclass(frozen=True, slots=True)
class Logged:
    """A request as it came."""

    at_ms: int
    method: str
    path: str
    headers: dict[str, str]
    body: str
    idempotency_key: str | None
    request_id: str
    status: int | None  # None: it never got an answer


class Books:
    """The store. Everything but `close` belongs inside `with books.transaction():`."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_BUSY_MS / 1000)
        self._database.row_factory = sqlite3.Row
        self._database.execute("PRAGMA journal_mode = DELETE")  # a command line may look in beside the server
        self._database.execute("PRAGMA synchronous = FULL")  # what was answered is booked, whatever kills the process
        with self.transaction():
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    self._database.execute(statement)
                self._database.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            elif version != _SCHEMA_VERSION:
                raise ValueError(f"{path}: books of version {version}, this double keeps {_SCHEMA_VERSION}")

    def close(self) -> None:
        with self._lock:
            self._database.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def offset_ms(self) -> int:
        """How far this clock is ahead of the machine's."""
        (offset_ms,) = self._database.execute("SELECT offset_ms FROM clock").fetchone()
        return int(offset_ms)

    def set_offset(self, offset_ms: int) -> None:
        self._database.execute("UPDATE clock SET offset_ms = ?", (offset_ms,))

    # ---- payment records

    def report(self, record_id: str, params: Mapping[str, Any], *, created: int, livemode: bool) -> str:
        """A new payment record; its id."""
        self._database.execute(
            "INSERT INTO record (id, created, livemode, state, reference, currency, requested, params, metadata) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                record_id,
                created,
                livemode,
                params.get("outcome", State.OPEN.value),
                params.get("processor_details", {}).get("custom", {}).get("payment_reference"),
                params["amount_requested"]["currency"],
                params["amount_requested"]["value"],
                json.dumps(params),
                json.dumps(params.get("metadata") or {}),
            ),
        )
        return record_id

    def advance(self, record_id: str, call: str, params: Mapping[str, Any], *, livemode: bool) -> None:
        """Guaranteed, failed, canceled or refunded. Raises `Conflict`."""
        row = self._row(record_id, livemode)
        if call == "report_refund":
            self._refund(row, params)
        elif row["state"] != State.OPEN.value:
            raise Conflict(400, None, None, f"This payment record is {row['state']}: its state cannot change any more.")
        else:
            self._database.execute("UPDATE record SET state = ? WHERE id = ?", (_MOVES[call].value, record_id))
        if params.get("metadata"):
            merged = json.loads(row["metadata"]) | params["metadata"]
            self._database.execute("UPDATE record SET metadata = ? WHERE id = ?", (json.dumps(merged), record_id))

    def _refund(self, row: sqlite3.Row, params: Mapping[str, Any]) -> None:
        left = row["requested"] - row["refunded"]
        amount = params.get("amount", {"value": left, "currency": row["currency"]})
        reference = params["processor_details"]["custom"]["refund_reference"]
        if row["state"] != State.GUARANTEED.value:
            raise Conflict(
                400, None, None, f"This payment record is {row['state']}: only a guaranteed one is refunded."
            )
        if amount["currency"] != row["currency"]:
            raise Conflict(400, "parameter_invalid", "amount[currency]", "The refund's currency is not the payment's.")
        if amount["value"] > left:
            raise Conflict(400, "amount_too_large", "amount[value]", f"Only {left} are left to refund.")
        known = self._database.execute(
            "SELECT 1 FROM refund WHERE reference = ? AND livemode = ?", (reference, row["livemode"])
        ).fetchone()
        if known is not None:
            param = "processor_details[custom][refund_reference]"
            raise Conflict(400, "parameter_invalid", param, "This refund reference was used before.")
        self._database.execute(
            "INSERT INTO refund VALUES (?, ?, ?, ?)", (reference, row["livemode"], row["id"], amount["value"])
        )
        self._database.execute("UPDATE record SET refunded = refunded + ? WHERE id = ?", (amount["value"], row["id"]))

    def document(self, record_id: str, *, livemode: bool) -> dict[str, Any]:
        """A payment record as the API shows it. Raises `Conflict` (404)."""
        return _document(self._row(record_id, livemode))

    def page(self, params: Mapping[str, Any], *, livemode: bool) -> tuple[list[dict[str, Any]], bool]:
        """Newest first, and whether there are more. Raises `Conflict` for a cursor that is no record."""
        wanted, values = ["livemode = ?"], [int(livemode)]
        order, limit = "DESC", int(params.get("limit", 10))
        for name, comparison in (("created_after", ">"), ("created_before", "<")):
            if name in params:
                wanted.append(f"created {comparison} ?")
                values.append(params[name])
        if "starting_after" in params and "ending_before" in params:
            raise Conflict(400, "parameter_invalid", "ending_before", "Only one cursor can be given.")
        for name, comparison in (("starting_after", "<"), ("ending_before", ">")):
            if name in params:
                wanted.append(f"number {comparison} ?")
                values.append(self._row(params[name], livemode, name)["number"])
                order = "DESC" if name == "starting_after" else "ASC"
        rows = self._database.execute(
            f"SELECT * FROM record WHERE {' AND '.join(wanted)} ORDER BY number {order} LIMIT ?",  # noqa: S608
            (*values, limit + 1),
        ).fetchall()
        page = [_document(row) for row in rows[:limit]]
        return (page if order == "DESC" else page[::-1]), len(rows) > limit

    def bookings(self) -> list[Booking]:
        """All payment records, in the order in which they were made."""
        return [_booking(row) for row in self._database.execute("SELECT * FROM record ORDER BY number")]

    def _row(self, record_id: str, livemode: bool, param: str = "id") -> sqlite3.Row:
        row: sqlite3.Row | None = self._database.execute(
            "SELECT * FROM record WHERE id = ? AND livemode = ?", (record_id, livemode)
        ).fetchone()
        if row is None:
            raise Conflict(404, "resource_missing", param, f"No such payment_record: '{record_id}'")
        return row

    # ---- results and requests

    def result(self, key: str, *, livemode: bool, now_ms: int) -> Result | None:
        """What is saved under a key; keys that are a day old are forgotten."""
        self._database.execute("DELETE FROM result WHERE first_ms <= ?", (now_ms - KEYS_LIVE_MS,))
        row = self._database.execute(
            "SELECT fingerprint, status, body, should_retry FROM result WHERE key = ? AND livemode = ?", (key, livemode)
        ).fetchone()
        return None if row is None else Result(*row)

    def save(self, key: str, result: Result, *, livemode: bool, first_ms: int) -> None:
        self._database.execute(
            "INSERT INTO result VALUES (?, ?, ?, ?, ?, ?, ?)",
            (key, livemode, first_ms, result.fingerprint, result.status, result.body, result.should_retry),
        )

    def log(self, request: Logged) -> int:
        """Note that a request has come; its number."""
        cursor = self._database.execute(
            "INSERT INTO request (at_ms, method, path, headers, body, idempotency_key, request_id) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                request.at_ms,
                request.method,
                request.path,
                json.dumps(request.headers),
                request.body,
                request.idempotency_key,
                request.request_id,
            ),
        )
        number = int(cursor.lastrowid or 0)
        self._database.execute("DELETE FROM request WHERE number <= ?", (number - LOG_MAX,))
        return number

    def answered(self, number: int, status: int) -> None:
        self._database.execute("UPDATE request SET status = ? WHERE number = ?", (status, number))

    def requests(self) -> list[Logged]:
        """What has come, oldest first."""
        rows = self._database.execute("SELECT * FROM request ORDER BY number")
        return [
            Logged(
                at_ms=row["at_ms"],
                method=row["method"],
                path=row["path"],
                headers=json.loads(row["headers"]),
                body=row["body"],
                idempotency_key=row["idempotency_key"],
                request_id=row["request_id"],
                status=row["status"],
            )
            for row in rows
        ]


def _booking(row: sqlite3.Row) -> Booking:
    return Booking(
        id=row["id"],
        payment_reference=row["reference"],
        amount=row["requested"],
        currency=row["currency"],
        state=State(row["state"]),
        refunded=row["refunded"],
        created=row["created"],
        livemode=bool(row["livemode"]),
        metadata=json.loads(row["metadata"]),
    )


def _document(row: sqlite3.Row) -> dict[str, Any]:
    params = json.loads(row["params"])

    def amount(value: int) -> dict[str, Any]:
        return {"currency": row["currency"], "value": value}

    def amount_if(state: State) -> dict[str, Any]:
        return amount(row["requested"] if row["state"] == state.value else 0)

    return {
        "id": row["id"],
        "object": "payment_record",
        "amount": amount(row["requested"]),
        "amount_authorized": amount(0),
        "amount_canceled": amount_if(State.CANCELED),
        "amount_failed": amount_if(State.FAILED),
        "amount_guaranteed": amount_if(State.GUARANTEED),
        "amount_refunded": amount(row["refunded"]),
        "amount_requested": amount(row["requested"]),
        "application": None,
        "created": row["created"],
        "customer_details": params.get("customer_details"),
        "customer_presence": params.get("customer_presence"),
        "description": params.get("description"),
        "latest_payment_attempt_record": "par_" + row["id"].removeprefix("pr_"),
        "livemode": bool(row["livemode"]),
        "metadata": json.loads(row["metadata"]),
        "payment_method_details": {"billing_details": None, "payment_method": None}
        | params.get("payment_method_details", {}),
        "processor_details": params.get("processor_details", {"type": "custom", "custom": None}),
        "reported_by": "self",
        "shipping_details": params.get("shipping_details"),
    }
