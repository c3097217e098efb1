"""Columns of a table as dates or numbers, of T cells. (pandas takes 1,5 for 15 where commas group digits.)"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from experiments.tables import Source
from experiments.tables.dates import dates_of, is_date

MISSING_CELLS = frozenset(
    "nan -nan na n/a <na> #n/a #na #div/0! #value! #ref! nat null none missing - -- \u2013 \u2014 ? . .. : 1.#qnan "
    "-1.#ind".split()
) | {""}  # in lower case


def _number_pattern(point: str, group: str) -> str:
    digits = rf"\d+(?:{point}\d*)?|{point}\d+|[1-9]\d{{0,2}}(?:{group}\d{{3}})+(?:{point}\d*)?"
    return rf"(?i:[+-]?(?:(?:{digits})(?:e[+-]?\d+)?|inf(?:inity)?))"


STYLES = {".": _number_pattern(r"\.", ","), ",": _number_pattern(",", r"\.")}  # by the decimal mark


def is_number(cell: str) -> bool:
    """True for a number, or a mark of a missing one."""
    return cell.lower() in MISSING_CELLS or any(re.fullmatch(pattern, cell) for pattern in STYLES.values())


@dataclass(eq=False)
class Column:
    """A column of a table."""

    name: str  # "" if it has none
    cells: pd.Series  # (T) as the table has them, text without spaces around it
    kind: str  # "dates", "numbers", or "text" if a cell is neither
    values: Any = None  # (T): a DatetimeIndex, or int64, or float64 with NaN for missing numbers
    problem: int = 0  # of text: the first row that is no number


def as_text(cells: pd.Series) -> pd.Series:
    """A column of text or of various objects as text, missing cells (T) as ""; another column as it is."""
    if cells.dtype.kind not in "ObTU" and not is_text(cells):
        return cells
    if not is_text(cells):
        cells = cells.map(lambda cell: "" if pd.isna(cell) is True else str(cell))
    return cells.astype("str").fillna("").str.strip()


def is_text(cells: pd.Series) -> bool:
    """True for a column made by `as_text`."""
    return isinstance(cells.dtype, pd.StringDtype)


def column_of(name: str, cells: pd.Series, mark: str, source: Source, may_be_date: bool) -> Column:
    """The column of cells (T) `as_text`, whose numbers have the decimal mark `mark`. Raises DataError as `dates_of`."""
    if is_text(cells):
        return _column_of_text(name, cells, mark, source, may_be_date)
    if isinstance(cells.dtype, pd.PeriodDtype):
        cells = cells.dt.to_timestamp()
    elif cells.dtype.kind == "m":
        cells = cells.dt.total_seconds()
    if cells.dtype.kind == "M":
        if gaps := cells.isna().sum():
            raise source.error(f"{gaps} of {len(cells)} dates are missing; leave out their rows, or the column", name)
        return Column(name, cells, "dates", pd.DatetimeIndex(cells))
    if pd.api.types.is_numeric_dtype(cells.dtype) and cells.dtype.kind in "iuf":
        whole = cells.dtype.kind == "i" and not cells.isna().any()
        return Column(name, cells, "numbers", cells.to_numpy(np.int64 if whole else np.float64, na_value=np.nan))
    return Column(name, cells.astype("str"), "text")


def _column_of_text(name: str, cells: pd.Series, mark: str, source: Source, may_be_date: bool) -> Column:
    gaps = cells.str.lower().isin(MISSING_CELLS).to_numpy(bool)
    numbers, known = np.full(len(cells), np.nan), cells[~gaps]
    if gaps.all():
        return Column(name, cells, "numbers", numbers)
    if may_be_date and is_date(known.iloc[0]):
        return Column(name, cells, "dates", dates_of(cells, name, source))
    fits = known.str.fullmatch(STYLES[mark]).to_numpy(bool)
    if not fits.all():
        return Column(name, cells, "text", problem=int(np.flatnonzero(~gaps)[fits.argmin()]))
    if not gaps.any() and known.str.fullmatch(r"[+-]?\d{1,19}").all():
        with suppress(OverflowError, ValueError):  # more than 64 bits
            return Column(name, cells, "numbers", known.astype("int64").to_numpy())
    plain = known.str.replace("," if mark == "." else ".", "", regex=False).str.replace(",", ".", regex=False)
    numbers[~gaps] = plain.astype(float)
    return Column(name, cells, "numbers", numbers)


def decimal_mark(parts: Sequence[tuple[str, pd.Series]], asked: Sequence[str], source: Source) -> str:
    """The decimal mark of the numbers in columns of text (name, cells): the other mark groups digits by three.

    The columns `asked` for decide; where both marks fit these, the other columns. Raises DataError for columns that
    contradict each other, and if both marks fit and would give other numbers.
    """
    marks, doubtful = set(STYLES), []
    for title, cells in sorted(parts, key=lambda one: one[0] not in asked):
        known = cells[cells.str.contains(r"\d[.,]|[.,]\d", regex=True)]
        if not len(known) or is_date(known.iloc[0]) or is_date(cells.iloc[0]):
            continue
        fits = {mark for mark, pattern in STYLES.items() if known.str.fullmatch(pattern).all()}
        if fits & marks:
            marks &= fits
        elif fits and (not asked or title in asked):
            problem = f"has a decimal {'point' if '.' in fits else 'comma'}, but a column before it has the other mark"
            raise source.error(f"{problem}; write all numbers with a decimal point", title)
        # %.3f writes a point into every number; where some have none, or semicolons divide cells, it may group digits
        in_all = len(known) == (~cells.str.lower().isin(MISSING_CELLS)).sum() and source.delimiter != ";"
        if len(fits) == 2 and ("," in known.iloc[0] or not in_all):
            doubtful.append(known.iloc[0])
    if len(marks) == 1:
        return marks.pop()
    if doubtful and source.delimiter != ",":
        cell = doubtful[0]
        problem = f"{cell!r} can be {cell.replace(',', '.')} or {re.sub('[.,]', '', cell)}"
        raise source.error(f"{problem}; write all numbers with a decimal point, and with more or fewer than 3 decimals")
    return "."
