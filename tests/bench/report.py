"""What every benchmark hands back, and how it is printed: medians with their spread, and ratios.

A time by itself says more about the machine than about the program. So each figure that matters stands beside a peer
that was measured in the same run, in turn with it; the ratio is the median over the rounds of the round's own ratio, so
that a machine which is slow for a second slows both sides of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

_LOW_PERCENT: Final = 10
_HIGH_PERCENT: Final = 90


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `low` and `high` are its 10th and 90th percentile, None for what was counted, not measured."""

    what: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    against: str = ""  # what the ratio divides by, or what to read the figure beside


@dataclass(frozen=True, slots=True)
class Section:
    """One benchmark's results. `notes` say what a reader must know to believe them."""

    name: str
    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = field(default=())


def measured(
    what: str, values: Sequence[float], unit: str, *, peer: Sequence[float] | None = None, against: str = ""
) -> Row:
    """The median of all rounds. `peer`: the same rounds of what it is compared with, in the same unit."""
    return Row(
        what=what,
        value=statistics.median(values),
        unit=unit,
        low=percentile(values, _LOW_PERCENT),
        high=percentile(values, _HIGH_PERCENT),
        ratio=None if peer is None else statistics.median(a / b for a, b in zip(values, peer, strict=True)),
        against=against,
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """The value at this place in order, the nearest one that was measured."""
    ordered = sorted(values)
    return ordered[round((len(ordered) - 1) * percent / 100)]


def show(console: Console, section: Section) -> None:
    """One aligned table, its notes below."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("measured", no_wrap=True)
    table.add_column("median", justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("p10 to p90", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("against", overflow="fold")
    for row in section.rows:
        spread = "" if row.low is None or row.high is None else f"{_figure(row.low)} to {_figure(row.high)}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(row.what, _figure(row.value), row.unit, spread, ratio, row.against)
    console.print()
    console.print(Text(f"{section.name}: {section.title}", style="bold"))
    console.print(table)
    for note in section.notes:
        console.print(Text(f"  {note}"), style="dim")


def _figure(value: float) -> str:
    """Three digits that mean something, no more."""
    if value == round(value):
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
