"""What a merchant sees of his sales at the host: one page, plain HTML and CSS, readable on a phone.

It only shows. Everything that is put into the page is escaped, and a policy forbids the browser to run or load
anything, so that not even a name chosen by a terminal can become more than text. A person logs in with the operator's
token once; the session is a cookie that says when it ends and proves that this host has said so: nothing is kept here.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from itertools import groupby
from typing import Final

from hwsim.host.messages import Checkpoint
from hwsim.host.store import Booking, DayTotal, Fork, Gap, State, TerminalSummary

COOKIE: Final = "__Host-payterm"  # with this prefix a browser takes it from this host over TLS only
SALES_ON_A_PAGE: Final = 50
DAYS: Final = 14
_SESSION_MS: Final = 12 * 3_600_000  # a working day
_LISTED_MAX: Final = 50  # forks and gaps on the page; a person begins with the first

# ISO 4217: currencies whose minor unit is not a hundredth.
_EXPONENTS: Final = {
    "BHD": 3, "CLP": 0, "IQD": 3, "ISK": 0, "JOD": 3, "JPY": 0, "KRW": 0, "KWD": 3, "LYD": 3, "OMR": 3, "PYG": 0,
    "TND": 3, "UGX": 0, "VND": 0, "XAF": 0, "XOF": 0, "XPF": 0,
}  # fmt: skip
_STATES: Final = {
    State.BOOKED: "booked",
    State.DECLINED: "declined",
    State.REVERSED: "reversed",
    State.TOMBSTONE: "never booked",
}

_STYLE: Final = """
:root { color-scheme: light dark; --ground: #f4f5f7; --sheet: #fff; --ink: #1a2230; --faint: #5d6778; --line: #e2e6ec;
  --good: #14693f; --good-ground: #dff4e8; --bad: #a32117; --bad-ground: #fde8e6; --off: #4c5566;
  --off-ground: #e8ebf0; --warn: #7a4b00; --warn-ground: #fff0d1; --accent: #1b4fd1 }
@media (prefers-color-scheme: dark) { :root { --ground: #10141b; --sheet: #191f29; --ink: #e7ebf2; --faint: #9aa5b8;
  --line: #2a3240; --good: #7fe0ad; --good-ground: #12382a; --bad: #ffaaa2; --bad-ground: #451a18; --off: #b6c0d0;
  --off-ground: #2a3240; --warn: #ffd588; --warn-ground: #41300c; --accent: #8fb0ff } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
header, main { max-width: 75rem; margin: 0 auto; padding: 0 1.25rem }
header { display: flex; align-items: baseline; gap: 1rem; padding-top: 1.25rem }
header p { margin: 0; flex: 1; color: var(--faint); font-size: .875rem }
h1 { margin: 0; white-space: nowrap; font-size: 1.375rem; letter-spacing: -.01em }
h2 { margin: 0 0 .75rem; font-size: 1.0625rem }
main { display: grid; gap: 1.25rem; padding-top: 1.25rem; padding-bottom: 3rem;
  grid-template-columns: minmax(0, 1fr) 19.5rem; align-items: start }
section { background: var(--sheet); border: 1px solid var(--line); border-radius: .75rem; padding: 1.125rem 1.25rem }
aside { display: grid; gap: 1.25rem }
.wide { grid-column: 1 / -1 }
table { width: 100%; border-collapse: collapse; font-size: .9375rem }
th { text-align: left; font-weight: 600; font-size: .8125rem; color: var(--faint); padding: 0 .75rem .375rem 0 }
td { padding: .5rem .75rem .5rem 0; border-top: 1px solid var(--line); vertical-align: baseline }
th:last-child, td:last-child { padding-right: 0 }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.strong { font-weight: 600 }
.faint, small { color: var(--faint) }
small { font-size: .8125rem; font-weight: 400 }
time, .nowrap { white-space: nowrap; font-variant-numeric: tabular-nums }
.state { display: inline-block; padding: .0625rem .5rem; border-radius: 1rem; font-size: .8125rem; font-weight: 600;
  white-space: nowrap }
.booked, .well { color: var(--good); background: var(--good-ground) }
.declined, .revoked { color: var(--bad); background: var(--bad-ground) }
.reversed, .tombstone { color: var(--off); background: var(--off-ground) }
.gone { color: var(--faint); text-decoration: line-through }
.day { margin: .75rem 0 .125rem; font-size: .8125rem; color: var(--faint) }
.day:first-of-type { margin-top: 0 }
.sum { display: flex; justify-content: space-between; gap: .5rem; text-align: right; align-items: baseline; margin: 0 }
.warning { color: var(--warn); background: var(--warn-ground); border-color: transparent }
.warning small { color: inherit }
ul { margin: 0; padding: 0; list-style: none }
li + li { margin-top: .5rem }
a { color: var(--accent) }
nav { display: flex; justify-content: space-between; margin-top: 1rem }
button { font: inherit; color: var(--accent); background: none; border: 1px solid var(--line); border-radius: .5rem;
  padding: .375rem .875rem; white-space: nowrap; cursor: pointer }
button:hover { border-color: var(--accent) }
.login { max-width: 24rem; margin: 12vh auto 0; padding: 1.75rem }
.login label { display: block; margin: 1rem 0 .375rem; font-weight: 600 }
.login input { width: 100%; font: inherit; padding: .5rem .75rem; border: 1px solid var(--line); border-radius: .5rem;
  background: var(--ground); color: inherit }
.login button { width: 100%; margin-top: 1rem; padding: .5rem; color: var(--sheet); background: var(--accent);
  border-color: transparent; font-weight: 600 }
.login .declined { padding: .5rem .75rem; border-radius: .5rem }
@media (max-width: 60rem) { main { grid-template-columns: minmax(0, 1fr) } }
@media (max-width: 40rem) {
  header, main { padding-left: .75rem; padding-right: .75rem }
  section { padding: 1rem }
  header { flex-wrap: wrap; gap: .25rem 1rem }
  header h1 { flex: 1 }
  header p { flex: 1 0 100%; order: 1 }
  thead { display: none }
  tr { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: .125rem .75rem; padding: .75rem 0;
    border-top: 1px solid var(--line) }
  tbody tr:first-child { border-top: 0; padding-top: 0 }
  td { border: 0; padding: 0 }
  .card { order: 1; text-align: left }
  .how { order: 2; text-align: right }
  .where { order: 3 }
  .code { order: 4; text-align: right }
  .whole { grid-column: 1 / -1; order: 5 }
  td[data-is]::before { content: attr(data-is) " "; color: var(--faint); font-size: .8125rem }
}
"""
_STYLE_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

HEADERS: Final = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; img-src data:; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True, slots=True)
class Overview:
    """What the page shows. `sales` are newest first; `older` is the place to go on from, None at the end."""

    now_ms: int
    configuration: str | None
    sales: Sequence[Booking]
    older: int | None
    newest: bool
    totals: Sequence[DayTotal]
    terminals: Sequence[TerminalSummary]
    checkpoints: Sequence[Checkpoint]
    gaps: Sequence[Gap]
    forks: Sequence[Fork]


def session(token: str, now_ms: int) -> str:
    """The Set-Cookie of somebody who has shown the operator's token."""
    expires_ms = now_ms + _SESSION_MS
    return f"{COOKIE}={expires_ms}.{_proof(token, expires_ms)}; {_attributes(_SESSION_MS // 1000)}"


def end_of_session() -> str:
    """The Set-Cookie of somebody who leaves."""
    return f"{COOKIE}=; {_attributes(0)}"


def is_session(token: str, cookies: str, now_ms: int) -> bool:
    """Whether one of these cookies (a Cookie header) proves a login that still lasts."""
    for cookie in cookies.split(";"):
        name, _, value = cookie.strip().partition("=")
        until, _, proof = value.partition(".")
        if name != COOKIE or not (until.isascii() and until.isdecimal() and len(until) <= 16):
            continue
        if hmac.compare_digest(proof.encode(), _proof(token, int(until)).encode()) and now_ms < int(until):
            return True
    return False


def login_page(*, refused: bool) -> bytes:
    """The form that asks for the operator's token."""
    wrong = '<p class="declined" role="alert">That is not the operator’s token.</p>' if refused else ""
    return _page(
        "Log in",
        '<section class="login"><h1>payterm host</h1>'
        f'{wrong}<form method="post" action="/merchant/login">'
        '<label for="token">Operator’s token</label>'
        '<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>'
        "<button>Log in</button></form></section>",
    )


def page(overview: Overview) -> bytes:
    """Everything at a glance; further pages of sales show only sales."""
    sales = _sales(overview)
    if overview.newest:
        body = (
            f"{_warnings(overview.gaps, overview.forks)}{sales}"
            f"<aside>{_totals(overview.totals)}</aside>{_terminals(overview)}"
        )
    else:
        body = f'<div class="wide">{sales}</div>'
    return _page(
        "Sales",
        "<header><h1>payterm host</h1>"
        f"<p>{_time(overview.now_ms)} UTC</p>"
        '<form method="post" action="/merchant/logout"><button>Log out</button></form></header>'
        f"<main>{body}</main>",
    )


def _page(title: str, body: str) -> bytes:
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)} · payterm host</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head>'
        f"<body>{body}</body></html>"
    ).encode()


def _sales(overview: Overview) -> str:
    if not overview.sales:
        return "<section><h2>Sales</h2><p>Nothing has come yet.</p></section>"
    rows = "".join(_sale(booking) for booking in overview.sales)
    back = "" if overview.newest else '<a href="/merchant">Newest</a>'
    on = "" if overview.older is None else f'<a href="/merchant?before={overview.older}">Older</a>'
    nav = f"<nav><span>{back}</span><span>{on}</span></nav>" if back or on else ""
    return (
        '<section><h2>Sales</h2><table><thead><tr><th>Received</th><th class="number">Amount</th><th>State</th>'
        f"<th>Card</th><th>Terminal</th><th>Code</th></tr></thead><tbody>{rows}</tbody></table>{nav}</section>"
    )


def _sale(booking: Booking) -> str:
    state = booking.state
    kind = "<small>refund</small> " if booking.kind == "refund" else ""
    why = booking.reason if state is not State.BOOKED else None
    if booking.advice == "refused":
        why = "card refused"
    gone = "" if state is State.BOOKED else ' class="gone"'
    card = f"•••• {escape(booking.last4)}" if booking.last4 else "unknown"
    sequence = "" if booking.sequence is None else f" #{booking.sequence}"
    return (
        f"<tr><td>{_time(booking.first_received_ms, seconds=False)}</td>"
        f'<td class="number strong">{kind}<span{gone}>{_money(booking.amount, booking.currency)}</span></td>'
        f'<td class="how"><span class="state {state.value}">{_STATES[state]}</span>'
        f"{_small(escape(why.replace('_', ' ')) if why else None)}</td>"
        f'<td class="card nowrap">{card}</td>'
        f'<td class="where nowrap">{escape(booking.terminal)}{sequence}</td>'
        f'<td class="code faint nowrap">{escape(booking.authorisation_code or "")}</td></tr>'
    )


def _totals(totals: Sequence[DayTotal]) -> str:
    if not totals:
        return '<section><h2>Totals</h2><p class="faint">Nothing is booked yet.</p></section>'
    parts, day = [], None
    for total in totals:
        if total.day != day:
            day = total.day
            parts.append(f'<p class="day">{day:%A}, {day.isoformat()}</p>')
        counts = _plural(total.sales, "sale")
        if total.refunds:
            counts += f", {_plural(total.refunds, 'refund')}"
        parts.append(
            f'<p class="sum"><span class="number strong">{_money(total.sum, total.currency)}</span>'
            f"<small>{counts}</small></p>"
        )
    return f"<section><h2>Totals, newest {DAYS} days</h2>{''.join(parts)}</section>"


def _terminals(overview: Overview) -> str:
    shown = {}
    for checkpoint in overview.checkpoints:  # by epoch, so that the newest one stays
        shown[checkpoint.terminal] = checkpoint
    rows = "".join(_terminal(each, shown.get(each.terminal), overview.now_ms) for each in overview.terminals)
    configuration = (
        f'<p class="faint">Configuration wanted: {escape(overview.configuration)}</p>' if overview.configuration else ""
    )
    if not rows:
        rows = "<tr><td>None is registered yet.</td></tr>"
    return (
        f'<section class="wide"><h2>Terminals</h2>{configuration}<table><thead><tr><th>Terminal</th><th>State</th>'
        "<th>Last seen</th><th>Epoch</th><th>Newest checkpoint</th><th>Client certificate</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></section>"
    )


def _terminal(terminal: TerminalSummary, checkpoint: Checkpoint | None, now_ms: int) -> str:
    if terminal.revoked_ms is None:
        state = '<span class="state well">admitted</span>'
    else:
        state = f'<span class="state revoked">revoked</span> <small>{_time(terminal.revoked_ms)}</small>'
    seen = "never" if terminal.last_received_ms is None else _time(terminal.last_received_ms)
    epoch = "none" if terminal.epoch is None else f"{terminal.epoch}{_small(f'envelope {terminal.number}')}"
    journal = "none"
    if checkpoint is not None:
        journal = f"record {checkpoint.sequence} of epoch {checkpoint.epoch}{_small(_time(checkpoint.taken_at))}"
    certificate = "none"
    if terminal.certificate_expires_ms is not None:
        word = "expired" if terminal.certificate_expires_ms <= now_ms else "until"
        certificate = f"{word} {_time(terminal.certificate_expires_ms)}"
    return (
        f'<tr><td class="strong">{escape(terminal.terminal)}{_small(escape(terminal.merchant))}</td>'
        f"<td>{state}</td>"
        f'<td class="whole" data-is="Last seen">{seen}</td><td class="whole" data-is="Epoch">{epoch}</td>'
        f'<td class="whole" data-is="Newest checkpoint">{journal}</td>'
        f'<td class="whole" data-is="Client certificate">{certificate}</td></tr>'
    )


def _warnings(gaps: Sequence[Gap], forks: Sequence[Fork]) -> str:
    """What wants a person; nothing if nothing does."""
    parts = []
    if forks:
        parts.append(
            _warning(
                "Forks: a terminal’s store was put back or copied",
                len(forks),
                (
                    f"{escape(fork.terminal)}, epoch {fork.epoch}, envelope {fork.number}: {escape(fork.detail)}"
                    f"{_small(f'{_time(fork.first_received_ms)}, received {_times(fork.received)}')}"
                    for fork in forks[-1 : -_LISTED_MAX - 1 : -1]
                ),
            )
        )
    if gaps:
        places = [(place, list(of)) for place, of in groupby(gaps, lambda gap: (gap.terminal, gap.epoch))]
        parts.append(
            _warning(
                "Gaps: envelopes that have not come although later ones have",
                len(places),
                (
                    f"{escape(terminal)}, epoch {epoch}: "
                    + ", ".join(_range(gap) for gap in of[:_LISTED_MAX])
                    + (f" and {len(of) - _LISTED_MAX} more" if len(of) > _LISTED_MAX else "")
                    for (terminal, epoch), of in places[:_LISTED_MAX]
                ),
            )
        )
    return "".join(parts)


def _warning(title: str, count: int, items: Iterable[str]) -> str:
    listed = "".join(f"<li>{item}</li>" for item in items)
    more = f"<li>and {count - _LISTED_MAX} more</li>" if count > _LISTED_MAX else ""
    return f'<section class="wide warning"><h2>{title}</h2><ul>{listed}{more}</ul></section>'


def _money(minor: int, currency: str) -> str:
    """12.50 EUR, with a true minus sign."""
    exponent = _EXPONENTS.get(currency, 2)
    whole, fraction = divmod(abs(minor), 10**exponent)
    digits = f"{whole:,}".replace(",", "\u202f") + (f".{fraction:0{exponent}d}" if exponent else "")
    return f"{'−' if minor < 0 else ''}{digits}\u00a0{escape(currency)}"


def _range(gap: Gap) -> str:
    return str(gap.first) if gap.first == gap.last else f"{gap.first} to {gap.last}"


def _time(time_ms: int, *, seconds: bool = True) -> str:
    """In UTC; a time that no calendar has, as a terminal without a clock may say, as a number."""
    try:
        moment = datetime.fromtimestamp(time_ms // 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return f"{time_ms} ms"
    shown = f"{moment:%Y-%m-%d %H:%M:%S}" if seconds else f"{moment:%Y-%m-%d %H:%M}"
    return f'<time datetime="{moment:%Y-%m-%dT%H:%M:%SZ}">{shown}</time>'


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _small(text: str | None) -> str:
    """`text` is markup."""
    return f" <small>{text}</small>" if text else ""


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _attributes(age_s: int) -> str:
    return f"Path=/; Max-Age={age_s}; Secure; HttpOnly; SameSite=Strict"


def _proof(token: str, expires_ms: int) -> str:
    return hmac.digest(token.encode(), f"payterm merchant session {expires_ms}".encode(), "sha256").hex()
