"""Columns of a table as dates or numbers. T cells.

Numbers in text are read here, as pandas takes 1,5 for 15 where commas group digits, and its `to_numeric` may round.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from experiments.tables.dates import dates_of, is_date
from experiments.tables.source import Source

MISSING_CELLS = frozenset(
    "nan -nan na n/a <na> #n/a #na #div/0! #value! #ref! nat null none missing - -- \u2013 \u2014 ? . .. : 1.#qnan "
    "-1.#ind".split()
) | {""}  # in lower case


def _number_pattern(point: str, group: str) -> str:
    digits = rf"\d+(?:{point}\d*)?|{point}\d+|[1-9]\d{{0,2}}(?:{group}\d{{3}})+(?:{point}\d*)?"
    return rf"(?i:[+-]?(?:(?:{digits})(?:e[+-]?\d+)?|inf(?:inity)?))"


STYLES = {".": _number_pattern(r"\.", ","), ",": _number_pattern(",", r"\.")}  # by the decimal mark


class Column(NamedTuple):
    """A column of a table."""

    name: str  # "" if it has none
    cells: pd.Series  # (T) as the table has them, text without spaces around it
    kind: str  # "dates", "numbers", or "text" if a cell is neither
    values: Any = None  # (T): a DatetimeIndex, or int64, or float64 with NaN for missing numbers
    problem: int = 0  # of text: the first row that is no number


def is_missing(cell: str) -> bool:
    """True if a cell is a mark of a missing value."""
    return cell.lower() in MISSING_CELLS


def as_text(cells: pd.Series) -> pd.Series:
    """A column of text or of various objects as text, missing cells (T) as ""; another column as it is."""
    if cells.dtype.kind not in "ObTU" and not isinstance(cells.dtype, pd.StringDtype):
        return cells
    if not isinstance(cells.dtype, pd.StringDtype):
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
    if pd.api.types.is_datetime64_any_dtype(cells.dtype):
        if gaps := cells.isna().sum():
            raise source.error(f"{gaps} of {len(cells)} dates are missing; leave out their rows, or the column", name)
        return Column(name, cells, "dates", pd.DatetimeIndex(cells))
    if cells.dtype.kind in "iuf" and pd.api.types.is_numeric_dtype(cells.dtype):
        whole = cells.dtype.kind == "i" and not cells.isna().any()
        return Column(name, cells, "numbers", cells.to_numpy(np.int64 if whole else np.float64, na_value=np.nan))
    return Column(name, cells.astype("str"), "text")


def _column_of_text(name: str, cells: pd.Series, mark: str, source: Source, may_be_date: bool) -> Column:
    gaps = cells.str.lower().isin(MISSING_CELLS).to_numpy(bool)
    if gaps.all():
        return Column(name, cells, "numbers", np.full(len(cells), np.nan))
    known = cells[~gaps] if gaps.any() else cells
    if may_be_date and is_date(known.iloc[0]):
        if gaps.any():
            cell = cells.iloc[row := int(gaps.argmax())] or "nothing"
            raise source.error(f"holds {cell!r}, expected a date written like the others", name, row)
        return Column(name, cells, "dates", dates_of(cells, name, source))
    fits = known.str.fullmatch(STYLES[mark]).to_numpy(bool)
    if not fits.all():
        return Column(name, cells, "text", problem=int(np.flatnonzero(~gaps)[fits.argmin()]))
    if not gaps.any() and known.str.fullmatch(r"[+-]?\d{1,19}").all():
        with suppress(OverflowError, ValueError):  # more than 64 bits
            return Column(name, cells, "numbers", known.astype("int64").to_numpy())
    plain = known.str.replace("," if mark == "." else ".", "", regex=False).str.replace(",", ".", regex=False)
    numbers = np.full(len(cells), np.nan)
    numbers[~gaps] = pa.array(plain).cast(pa.float64()).to_numpy(zero_copy_only=False)
    return Column(name, cells, "numbers", numbers)


def decimal_mark(parts: Sequence[tuple[str, pd.Series]], asked: Sequence[str], source: Source) -> str:
    """The decimal mark of the numbers in columns of text (name, cells): the other mark groups digits by three.

    The columns `asked` for decide; where both marks fit these, the other columns. Raises DataError if two of them, or
    any two if none are asked for, contradict each other, and if both marks fit and would give other numbers.
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
