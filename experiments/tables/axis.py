"""Find the times of a table among its columns. T rows."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd

from experiments.tables import Table
from experiments.tables.cells import Column
from experiments.tables.dates import CLOCK, dates_of, dates_of_numbers
from experiments.tables.times import time_texts

EQUAL_STEPS = 1e-6  # by how much the steps of a column without a telling name may differ, relative to their mean
# Numbers under the first names, or WITH_UNIT, are times, whatever their steps; under the last they rise in equal steps.
TIME_NAMES = frozenset(
    "t time times timestamp ds date dates datetime day days week weeks month months quarter quarters year years period "
    "season semester hour hours minute minutes second seconds datum zeit jahr monat quartal woche stunde année mois "
    "trimestre jour heure año fecha doy time_period".split()
)
UNIT = "[ _.](?:[mnuµ]?s|sec(?:ond)?s?|min(?:ute)?s?|h|hrs?|hours?|days?)"
WITH_UNIT = rf"(?:elapsed|time)(?:[ _.]time)?(?:{UNIT})?|(?:decimal|fractional)[ _.](?:date|year)"
COUNTER_NAMES = rf"steps?|index|idx|id|row|obs|t{UNIT}"  # t_min can be a temperature, too
PARTS = ("year", "month", "quarter", "day", "hour", "minute", "second")  # of a date, in columns of their own
Found = tuple[pd.Index | None, list[Column]]  # the times, and the columns that they and other times are in


def time_axis(free: list[Column], groups: list[np.ndarray], named: int, table: Table) -> Found:
    """The times of all rows; None if the table has none.

    free: the columns that are not asked for as variables; `named` columns have names. groups: the rows of each series.
    Times are in a column of dates, with a clock or an hour in another one; in columns with parts of dates; or in a
    column of numbers, whose name or steps say so. Raises DataError for columns that can both be the times.
    """
    if any(one.kind == "dates" for one in free):
        return _of_dates(free, groups, table)
    if found := _of_parts(free, table):
        return found
    early = free[: next((at for at, one in enumerate(free) if one.name), 0) + 1]
    # the only column with, or without a name is what can be forecast
    numbers = [one for one in free if one.kind == "numbers" and named != bool(one.name)]
    large = [one for one in numbers if one.values.min() >= 10**7]  # such as 20231231, or Unix seconds
    read = {one: dates_of_numbers(one.values, one.name, table, False) for one in large}
    dates = {one: found for one, found in read.items() if found is not None}
    telling = [one for one in numbers if tells_time(one.name) or one in dates]
    if len(groups) == 1 and not any(rises(one.values) for one in [*telling, *large]):
        _refuse_several(numbers, table)
    if dates and not any(rises(one.values, groups) for one in telling):  # these are refused, with the rows that fall
        return _of_dates([replace(one, kind="dates", values=found) for one, found in dates.items()], groups, table)
    later = [one for one in telling if one not in early and rises(one.values, groups)]
    # a telling first one, telling later ones, the first ones
    for one in [*(one for one in early if one in telling), *later, *early]:
        if one in numbers and (axis := _of_numbers(one, groups, table)) is not None:
            return axis, [one]
    return None, []


def _refuse_several(columns: list[Column], table: Table) -> None:
    """Raise DataError if numbers count anew for each value of another column: several series, one below the other."""
    for outer in columns:
        begins = np.flatnonzero(np.append(True, outer.values[1:] != outer.values[:-1]))
        if not 1 < len(begins) <= len(outer.values) // 3 or len(begins) != len(np.unique(outer.values)):
            continue
        runs = np.split(np.arange(len(outer.values)), begins[1:])
        for one in (one for one in columns if min(map(len, runs)) >= 3 and _begins_anew(one, runs)):
            if tells_time(one.name) or not tells_time(outer.name):
                raise table.error(
                    f"{one.name!r} begins anew for each {outer.name!r}; if these are {len(runs)} series, one below the "
                    f"other, tell them apart with --id {outer.name}; if both are parts of dates, put them into one "
                    "column, such as 2023-01-31 or 2023-W05; if both are variables, name them with --columns"
                )


def _begins_anew(one: Column, runs: list[np.ndarray]) -> bool:
    """True if numbers rise in each run of rows as times do, but not from one to the next."""
    is_time = tells_time(one.name) and rises(one.values, runs)
    return not rises(one.values) and (is_time or all(_is_axis(one.name, one.values[rows]) for rows in runs))


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
    if len(moving) > 1:
        raise table.error(f"{moving[0].name!r} and {moving[1].name!r} can both be the times; delete one of them")
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
    quarter = values.pop("quarter", 1)  # a month says more
    found = pd.to_datetime(pd.DataFrame({"month": 3 * quarter - 2, "day": 1} | values), errors="coerce")
    if found.isna().any():
        return None
    table.notes.append(" and ".join(repr(one.name) for one in parts.values()) + " put together")
    return pd.DatetimeIndex(found, name="time"), list(parts.values())


def _of_numbers(one: Column, groups: list[np.ndarray], table: Table) -> pd.Index | None:
    """The times in a column of numbers. A count from 0 without a name is no time axis."""
    title = one.name if table.has_names else ""
    is_telling = tells_time(title)
    found = dates_of_numbers(one.values, title, table, is_telling)
    if found is not None and (is_telling or rises(one.values, groups)):
        return found.rename(title or "time")
    counts = not one.name and np.array_equal(one.values, np.arange(len(one.values)))
    if not counts and (is_telling or all(_is_axis(title, one.values[rows]) for rows in groups)):
        return pd.Index(one.values, name=title or "time")
    return None


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


def _is_axis(name: str, values: np.ndarray) -> bool:
    """True if numbers (T) rise in equal steps and are called by a counter, or are three without a name, or whole."""
    is_many = len(values) >= 3 and (not name or bool((values == np.round(values)).all()))
    return equal_steps(values) and (is_many or re.fullmatch(COUNTER_NAMES, name.lower()) is not None)


def check_order(index: pd.Index, rows: np.ndarray, of: str, table: Table) -> None:
    """Raise DataError for times that fall or repeat, or numbers that are not finite. `of` names the series, if any."""
    name = str(index.name)
    if index.dtype.kind == "f" and not (known := np.isfinite(index.to_numpy())).all():
        raise table.error(f"has no time in {name!r}, expected a number", row=rows[known.argmin()])
    if index.is_monotonic_increasing and index.is_unique:
        return
    at = int((index[1:] <= index[:-1]).argmax()) + 1
    before, now = time_texts(index[[at - 1, at]], index)
    advice = f"{name!r} is a variable, name it with --columns"
    if isinstance(index, pd.DatetimeIndex):
        advice = "the clock was set back there, write times with their offset from UTC"
    problem = f"the time {now}{of} comes after {before}; sort the rows by time, the oldest first; if {advice}"
    twice = index[index.duplicated()]
    if now == before or (not of and len(twice)):
        problem = (
            f"the time {time_texts(twice, index)[0]}{of} repeats ({(index == twice[0]).sum()} rows have it); put dates "
            "and clocks into one column, such as 2023-01-31 14:00+01:00; or, if the table has several series, name the "
            "column that tells them apart with --id; or keep one row for each time"
        )
    raise table.error(problem, name, rows[at])
