"""Columns of text cells as dates or numbers. T cells.

Numbers are read here and not by pandas, whose thousands mark takes 1,5 for 15, and whose `to_numeric` may round.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from experiments.tables import DataError
from experiments.tables.times import dates_of, is_date

MISSING_CELLS = frozenset(
    "nan -nan na n/a <na> #n/a #na #div/0! #value! #ref! nat null none missing - -- \u2013 \u2014 ? . .. : 1.#qnan "
    "-1.#ind".split()
) | {""}  # in lower case


def _number_pattern(point: str, group: str) -> str:
    digits = rf"\d+(?:{point}\d*)?|{point}\d+|[1-9]\d{{0,2}}(?:{group}\d{{3}})+(?:{point}\d*)?"
    return rf"(?i:[+-]?(?:(?:{digits})(?:e[+-]?\d+)?|inf(?:inity)?))"


STYLES = {".": _number_pattern(r"\.", ","), ",": _number_pattern(",", r"\.")}  # by the decimal mark


class Source(NamedTuple):
    """Where a table comes from, for messages."""

    name: str  # such as the path
    place: Callable[[int], str] = "row {}".format  # of a row, counted from 0
    fill: str = "fill them with --missing interpolate"  # what to do about missing values
    leave_out: str = "leave columns out with --columns"  # and about a column that is not wanted
    name_id: str = "name the column that tells them apart with --id"  # and about several series
    has_names: bool = True


class Column(NamedTuple):
    """A column of a table."""

    name: str  # "" if it has none
    cells: pd.Series  # (T) as the table has them
    kind: str  # "dates", "numbers", or "text" if a cell is neither
    values: Any = None  # (T): a DatetimeIndex, or int64, or float64 with NaN for missing numbers
    problem: int = 0  # of text: the first row that is no number


def is_missing(cell: str) -> bool:
    """True if a cell is a mark of a missing value."""
    return cell.lower() in MISSING_CELLS


def column_of(name: str, cells: pd.Series, mark: str, source: Source, may_be_date: bool = True) -> Column:
    """The column of cells of text (T), whose numbers have the decimal mark `mark`. Raises DataError as `dates_of`."""
    gaps = cells.str.lower().isin(MISSING_CELLS).to_numpy(bool)
    if gaps.all():
        return Column(name, cells, "numbers", np.full(len(cells), np.nan))
    if may_be_date and is_date(cells[~gaps].iloc[0]):
        if gaps.any():
            row = int(gaps.argmax())
            raise DataError(
                f"{source.name}, {source.place(row)}, column {name!r}: holds {cells.iloc[row] or 'nothing'!r}, "
                "expected a date written like the others"
            )
        return Column(name, cells, "dates", dates_of(cells, f"{source.name}, column {name!r}", source.place))
    known = cells[~gaps] if gaps.any() else cells
    fits = known.str.fullmatch(STYLES[mark]).to_numpy(bool)
    if not fits.all():
        return Column(name, cells, "text", problem=int(np.flatnonzero(~gaps)[fits.argmin()]))
    if not gaps.any() and known.str.fullmatch(r"[+-]?\d{1,19}").all():
        with suppress(OverflowError, ValueError):  # more than 64 bits
            return Column(name, cells, "numbers", known.astype("int64").to_numpy())
    group = "," if mark == "." else "."
    if known.str.contains(group, regex=False).any():
        known = known.str.replace(group, "", regex=False)
    if mark == ",":
        known = known.str.replace(",", ".", regex=False)
    numbers = np.full(len(cells), np.nan)
    numbers[~gaps] = pa.array(known).cast(pa.float64()).to_numpy(zero_copy_only=False)
    return Column(name, cells, "numbers", numbers)


def decimal_mark(
    name: str, parts: Sequence[tuple[str, pd.Series]], wanted: Sequence[str] | None, delimiter: str
) -> str:
    """The decimal mark of the numbers in columns (name, cells): the other mark groups digits by three.

    The columns `wanted` decide; where both marks fit these, the other columns. Raises DataError if wanted columns
    contradict each other, or if both marks fit and would give other numbers; where commas divide the columns, commas in
    numbers group digits then.
    """
    marks, doubtful = set(STYLES), []
    for title, part in sorted(parts, key=lambda one: wanted is not None and one[0] not in wanted):
        if is_date(part.iloc[0]):
            continue
        known = part[part.str.contains(r"\d[.,]|[.,]\d", regex=True)]
        if not len(known) or is_date(known.iloc[0]):
            continue
        fits = {mark for mark, pattern in STYLES.items() if known.str.fullmatch(pattern).all()}
        if fits & marks:
            marks &= fits
        elif fits and (wanted is None or title in wanted):
            raise DataError(
                f"{name}, column {title!r}: has a decimal {'point' if '.' in fits else 'comma'}, but a column before "
                "it has the other mark; write all numbers with a decimal point"
            )
        if len(fits) == 2:
            # %.3f writes a point into every number; where some have none, it may well group digits
            in_all = len(known) == (~part.str.lower().isin(MISSING_CELLS)).sum()
            doubtful += [known.iloc[0]] if "," in known.iloc[0] or not in_all else []
    if len(marks) == 1:
        return marks.pop()
    if doubtful and delimiter != ",":
        cell = doubtful[0]
        raise DataError(
            f"{name}: {cell!r} can be {cell.replace(',', '.')} or {re.sub('[.,]', '', cell)}; write all numbers with a "
            "decimal point, without marks between thousands, and with another number of decimals than three"
        )
    return "."
