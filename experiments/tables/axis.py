"""Find the times of a table among its columns. T rows."""

import re

import numpy as np
import pandas as pd

from experiments.tables.cells import Column
from experiments.tables.dates import CLOCK, dates_of, dates_of_numbers
from experiments.tables.table import Table
from experiments.tables.times import time_texts

EQUAL_STEPS = 1e-6  # by how much equal steps of a first column may differ, relative to their mean
TIME_NAMES = frozenset(
    "t time times timestamp ds date dates datetime day days week weeks month months quarter quarters year years period "
    "season semester hour hours minute minutes second seconds datum zeit jahr monat quartal woche stunde année mois "
    "trimestre jour heure año fecha doy time_period yyyymm".split()
)
UNIT = "[ _.](?:[mnuµ]?s|sec(?:ond)?s?|min(?:ute)?s?|h|hrs?|hours?|days?)"
WITH_UNIT = rf"(?:elapsed|time)(?:[ _.]time)?(?:{UNIT})?|(?:decimal|fractional)[ _.](?:date|year)"
PARTS = ("year", "month", "quarter", "day", "hour", "minute", "second")  # of a date, in columns of their own
Found = tuple[pd.Index | None, list[Column]]  # the times, and the columns that they and other times are in


def time_axis(free: list[Column], groups: dict[str, np.ndarray], named: int, table: Table) -> Found:
    """The times of all rows; None if the table has none.

    free: the columns that are not asked for as variables; `named` columns have names. groups: the rows of each series.
    Times are in a column of dates, with a clock or an hour in another one; or in columns with parts of dates; or in a
    column of numbers that is called as times are, of several in one that rises; or in the first column, if it rises in
    equal steps. Raises DataError for columns that can both be the times, for times that fall or repeat, and for numbers
    that begin anew for each value of another column.
    """
    if not any(one.kind == "dates" for one in free):
        for one in (one for one in free if one.kind == "numbers"):
            if (dates := dates_of_numbers(one.values, one.name, table, tells_time(one.name))) is not None:
                one.kind, one.values = "dates", dates
    rows_of = [*groups.values()]
    if any(one.kind == "dates" for one in free):
        axis, used = _of_dates(free, rows_of, table)
    else:
        axis, used = _of_parts(free, table) or _of_numbers(free, rows_of, named, table)
    for title, rows in groups.items():
        if axis is not None:
            _check_order(axis[rows], rows, "" if len(groups) == 1 else f" of series {title!r}", table)
    return axis, used


def _of_numbers(free: list[Column], groups: list[np.ndarray], named: int, table: Table) -> Found:
    """The times in a column of numbers. The only column with, or without a name is what can be forecast."""
    numbers = [one for one in free if one.kind == "numbers" and named != bool(one.name)]
    telling = [one for one in numbers if tells_time(one.name)]
    found = [one for one in telling if rises(one.values, groups)] or telling
    if not telling:
        unknown = [one for one in free if one.kind == "text" and tells_time(one.name)]
        for one in (one for one in unknown if one.cells.str.contains(r"\d").any()):
            problem = f"holds {one.cells[one.problem][:40]!r}, expected a date such as 2023-01-31, or a number"
            raise table.error(f"{problem}; leave out titles and units, or the column", one.name, one.problem)
        if len(groups) == 1:
            _refuse_several(numbers, free, table)
    count = np.arange(sum(map(len, groups)))  # as pandas numbers rows
    first = next((one for one in free if one.name or not np.array_equal(one.values, count)), None)
    if not found and first in numbers and all(len(rows) > 2 and equal_steps(first.values[rows]) for rows in groups):
        dates_of_numbers(first.values, first.name, table, True)  # refuses 2023.01
        found = [first]
    if not found:
        return None, []
    return pd.Index(found[0].values, name=(table.has_names and found[0].name) or "time"), found[:1]


def _refuse_several(numbers: list[Column], columns: list[Column], table: Table) -> None:
    """Raise DataError if numbers do not rise, but do in equal steps in the rows of each value of another column."""
    rows = {one.name: pd.Series(range(len(one.cells))).groupby(one.cells, dropna=False) for one in columns}
    parts = {
        name: [*found.indices.values()] for name, found in rows.items() if len(found) > 1 and found.size().min() > 2
    }
    for one in (one for one in numbers if not rises(one.values)):
        for name, series in parts.items():
            if name != one.name and all(equal_steps(one.values[part]) for part in series):
                problem = f"counts anew for each {name!r}; if these are {len(series)} series, tell them apart"
                advice = f"with --id {name}; if both are variables, name them with --columns"
                raise table.error(f"{problem} {advice}", one.name)


def _of_dates(free: list[Column], groups: list[np.ndarray], table: Table) -> Found:
    """The times in columns of dates, put together with a clock where the dates have none."""
    dated = [one for one in free if one.kind == "dates"]
    first, moving = dated[0], [one for one in dated if rises(one.values, groups)]
    clocks = [one for one in free if one.kind == "text" and one.cells.str.fullmatch(CLOCK).all()]
    if not moving:
        clocks += [one for one in free if one.name.lower() == "hour" and one.kind == "numbers"]
    if clocks and (first.values == first.values.normalize()).all():
        clock = clocks[0].cells.astype("str") + (":00" if clocks[0].kind == "numbers" else "")
        both = pd.Series(first.values.strftime("%Y-%m-%d "), dtype="str") + clock
        table.notes.append(f"{first.name!r} and {clocks[0].name!r} put together")
        return dates_of(both, clocks[0].name, table).rename(first.name), [*dated, clocks[0]]
    if others := [one for one in moving if not one.values.equals(moving[0].values)]:
        raise table.error(f"{moving[0].name!r} and {others[0].name!r} can both be the times; delete one of them")
    axis = (moving or dated)[0]
    table.notes += [f"{one.name!r} left out, as {axis.name!r} has the times" for one in dated if one is not axis]
    return axis.values.rename(axis.name or "time"), dated


def _of_parts(free: list[Column], table: Table) -> Found | None:
    """The times in columns such as year and month, if the years repeat; None if there are none."""
    called = {re.sub("^qtr$", "quarter", one.name.lower()): one for one in free if one.kind == "numbers"}
    parts = {name: one for name, one in called.items() if name in PARTS}
    if "year" not in parts or not {"month", "quarter"} & parts.keys() or rises(parts["year"].values):
        return None
    values = {part: one.values for part, one in parts.items()}
    if max(values["year"]) < 100:
        raise table.error("has years of two digits, of this century or the last; write all four", parts["year"].name)
    quarter = values.pop("quarter", 1)  # a month says more
    found = pd.to_datetime(pd.DataFrame({"month": 3 * quarter - 2, "day": 1} | values), errors="coerce")
    if found.isna().any():
        return None
    table.notes.append(" and ".join(repr(one.name) for one in parts.values()) + " put together")
    return pd.DatetimeIndex(found, name="time"), list(parts.values())


def tells_time(name: str) -> bool:
    """True if a column's name says that it holds times. A # before it, and a unit in brackets after it, are ignored."""
    plain = re.sub(r"^# *|\s*[\[(].*", "", name, flags=re.DOTALL).lower()
    return plain in TIME_NAMES or re.fullmatch(WITH_UNIT, plain) is not None


def rises(values, groups=(slice(None),)) -> bool:
    """True if times, or finite numbers, rise strictly, by finite steps, in all groups of rows."""
    for index in (pd.Index(values[rows]) for rows in groups):
        with np.errstate(over="ignore"):  # from the first to the last is no further than a float can tell
            is_finite = isinstance(index, pd.DatetimeIndex) or np.isfinite(index[-1:] - index[:1]).all()
        if not (is_finite and index.is_monotonic_increasing and index.is_unique):
            return False
    return True


def equal_steps(values: np.ndarray) -> bool:
    """True if numbers rise in equal steps."""
    steps = np.diff(values)
    return rises(values) and (not len(steps) or bool(np.ptp(steps) <= EQUAL_STEPS * steps.mean()))


def _check_order(index: pd.Index, rows: np.ndarray, of: str, table: Table) -> None:
    """Raise DataError for times that fall or repeat, or numbers that are not finite. `of` names the series, if any."""
    name = str(index.name)
    if index.dtype.kind == "f" and not (known := np.isfinite(index.to_numpy())).all():
        raise table.error(f"has no time in {name!r}, expected a number", row=rows[known.argmin()])
    if index.is_monotonic_increasing and index.is_unique:
        return
    at = int((index[1:] <= index[:-1]).argmax()) + 1
    before, now = time_texts(index[[at - 1, at]], index)
    what = "repeats" if now == before else f"comes after {before}"
    raise table.error(
        f"the time {now}{of} {what}; sort the rows by time, the oldest first, each time once; if the table has several "
        "series, name the column that tells them apart with --id; put dates and clocks into one column, such as "
        "2023-01-31 14:00+01:00, with their offset from UTC if the clock was set back there; if "
        f"{name!r} is a variable, name it with --columns, or leave it out of the table",
        name,
        rows[at],
    )
