"""Columns of a table as dates or numbers, of T cells. (pandas takes 1,5 for 15 where commas group digits.)"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from experiments.tables.dates import dates_of, is_date
from experiments.tables.table import Table

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


def columns_of(table: Table, asked: Sequence[str]) -> list[Column]:
    """The columns of a table, those `asked` for as numbers. Raises DataError as `dates_of`, and for decimal marks."""
    # pandas and R call a column without a name so
    parts = [
        (re.sub(r"^(Unnamed: \d+|rownames)$", "", title).strip(), _as_text(cells)) for title, cells in table.columns
    ]
    mark = _decimal_mark([part for part in parts if part[1].dtype == "str"], asked, table)
    return [_column(title, cells, mark, title not in asked, table) for title, cells in parts]


def _as_text(cells) -> pd.Series:
    """The cells (T) of dates, durations or numbers as they are, others as text, missing ones as ""."""
    cells = pd.Series(cells).reset_index(drop=True)
    cells = cells.dt.to_timestamp() if isinstance(cells.dtype, pd.PeriodDtype) else cells
    if cells.dtype.kind in "Mmiuf":
        return cells
    if not isinstance(cells.dtype, pd.StringDtype):
        cells = cells.map(lambda cell: "" if pd.isna(cell) is True else str(cell))
    return cells.astype("str").fillna("").str.strip()


def _column(name: str, cells: pd.Series, mark: str, may_be_date: bool, table: Table) -> Column:
    """The column of cells (T) `_as_text`, whose numbers have the decimal mark `mark`."""
    if cells.dtype.kind == "M":
        if missing := cells.isna().sum():
            raise table.error(f"{missing} of {len(cells)} dates are missing; leave out their rows, or the column", name)
        return Column(name, cells, "dates", pd.DatetimeIndex(cells))
    if cells.dtype.kind == "m":
        cells = cells.dt.total_seconds()
    if cells.dtype != "str":
        whole = cells.dtype.kind == "i" and not cells.isna().any()
        numbers = cells.to_numpy(np.int64) if whole else cells.to_numpy(np.float64, na_value=np.nan)
        return Column(name, cells, "numbers", numbers)
    gaps = cells.str.lower().isin(MISSING_CELLS).to_numpy(bool)
    known = cells[~gaps]
    if may_be_date and len(known) and is_date(known.iloc[0]):
        return Column(name, cells, "dates", dates_of(cells, name, table))
    fits = known.str.fullmatch(STYLES[mark]).to_numpy(bool)
    if not fits.all():
        return Column(name, cells, "text", problem=int(known.index[fits.argmin()]))
    if not gaps.any() and known.str.fullmatch(r"[+-]?\d{1,19}").all():
        with suppress(OverflowError, ValueError):  # more than 64 bits
            return Column(name, cells, "numbers", known.astype("int64").to_numpy())
    numbers = np.full(len(cells), np.nan)
    numbers[~gaps] = known.str.translate(str.maketrans(mark, ".", ",.".replace(mark, ""))).astype(float)
    return Column(name, cells, "numbers", numbers)


def _decimal_mark(parts: Sequence[tuple[str, pd.Series]], asked: Sequence[str], table: Table) -> str:
    """The decimal mark of the numbers in columns of text (name, cells): the other mark groups digits by three.

    The columns `asked` for decide; where both marks fit these, the other columns. Raises DataError for columns that
    contradict each other, and if both marks fit and would give other numbers.
    """
    found: dict[str, str] = {}  # marks, and names of columns that no other mark fits
    doubtful = []
    for title, cells in sorted(parts, key=lambda one: one[0] not in asked):
        known = cells[cells.str.contains(r"\d[.,]|[.,]\d", regex=True)]
        fits = [mark for mark, pattern in STYLES.items() if known.str.fullmatch(pattern).all()]
        if len(fits) == 1 and (title in asked or not asked or not found):
            found.setdefault(fits[0], title)
        # %.3f writes a point into every number; where some have none, or semicolons divide cells, it may group digits
        in_all = len(known) == (~cells.str.lower().isin(MISSING_CELLS)).sum() and table.delimiter != ";"
        if len(fits) == 2 and len(known) and ("," in known.iloc[0] or not in_all):
            doubtful.append(known.iloc[0])
    if len(found) > 1:
        problem = f"has decimal points in column {found['.']!r} and decimal commas in column {found[',']!r}"
        raise table.error(f"{problem}; write all numbers with a decimal point")
    if not found and doubtful and table.delimiter != ",":
        cell = doubtful[0]
        problem = f"{cell!r} can be {cell.replace(',', '.')} or {re.sub('[.,]', '', cell)}"
        raise table.error(f"{problem}; write all numbers with a decimal point, and with more or fewer than 3 decimals")
    return next(iter(found), ".")
