"""Find the times of a table among its columns. T rows."""

import re

import numpy as np
import pandas as pd

from experiments.tables import DataError
from experiments.tables.cells import Column, Source
from experiments.tables.times import CLOCK, dates_of_numbers, time_texts

EQUAL_STEPS = 1e-6  # by how much the steps of a column without a telling name may differ, relative to their mean
# Numbers under the first names are times, whatever their steps; under the second they must rise in equal steps.
TIME_NAMES = frozenset(
    "t time times timestamp ds date dates datetime day days week weeks month months quarter quarters year years period "
    "hour hours minute minutes second seconds".split()
)
COUNTER_NAMES = frozenset("step steps index idx id row obs".split())
PARTS = ("year", "month", "day", "hour", "minute", "second")  # of a date, in columns of their own


def time_axis(
    free: list[Column], groups: list[np.ndarray], named: int, source: Source, notes: list[str]
) -> tuple[pd.Index | None, list[Column]]:
    """The times of all rows, and the columns that they and other times are in; None if the table has no times.

    free: the columns that are not asked for as variables; `named` columns have names. groups: the rows of each series.
    Times are in a column of dates, with a clock or an hour in another one; in columns with parts of dates; or in the
    first column, or the first one with a name, if its numbers say so (`_is_axis`). A count from 0 without a name is no
    time axis. What was chosen is added to `notes`. Raises DataError for columns that can both be the times.
    """
    dated = [one for one in free if one.kind == "dates"]
    moving = [one for one in dated if all(_rises(one.values[rows]) for rows in groups)]
    clocks = [one for one in free if one.kind == "text" and _is_clock(one)]
    by_part = {one.name.strip().lower(): one for one in free if one.kind == "numbers"}
    if (
        dated and clocks and (dated[0].values == dated[0].values.normalize()).all()
    ):  # the dates have no clock themselves
        text = clocks[0].cells.astype(str).str.replace(r"^(\d{1,2}:\d{2})$", r"\1:00", regex=True)
        both = pd.to_datetime(pd.Series(dated[0].values.strftime("%Y-%m-%d ")) + text, format="mixed", errors="coerce")
        if both.isna().any():
            row = int(both.isna().to_numpy().argmax())
            raise DataError(
                f"{source.name}, {source.place(row)}: {text[row]!r} is not a time of day; write 00:00 to 23:59"
            )
        notes.append(f"{dated[0].name!r} and {clocks[0].name!r} put together")
        return pd.DatetimeIndex(both, name=dated[0].name), [*dated, clocks[0]]
    if dated and not moving and "hour" in by_part and (hour := by_part["hour"]).values.dtype.kind == "i":
        if hour.values.min() < 0 or hour.values.max() > 23:
            raise DataError(f"{source.name}: {hour.name!r} has {hour.values.max()}, expected hours from 0 to 23")
        notes.append(f"{dated[0].name!r} and {hour.name!r} put together")
        hours = pd.to_timedelta(hour.values, unit="h")
        return pd.DatetimeIndex(dated[0].values + hours, name=dated[0].name), [*dated, hour]
    if dated:
        if len(moving) > 1:
            raise DataError(
                f"{source.name}: {moving[0].name!r} and {moving[1].name!r} can both be the times; delete one of them"
            )
        axis = (moving or dated)[0]
        notes += [f"{one.name!r} left out, as {axis.name!r} has the times" for one in dated if one is not axis]
        is_text, in_utc = axis.cells.dtype.kind not in "M", str(axis.values.tz) == "UTC"
        if is_text and in_utc and not axis.cells.astype(str).str.contains(r"(?:Z|UTC|GMT|\+00:?00)$", regex=True).all():
            notes.append(f"{axis.name!r} has several offsets, its times are in UTC")
        return axis.values.rename(axis.name or "time"), dated
    known = [by_part[part] for part in (*PARTS, "quarter") if part in by_part]
    if "year" in by_part and {"month", "quarter"} & by_part.keys() and not _rises(by_part["year"].values):
        parts = {one.name.strip().lower(): one.values for one in known}
        quarter = parts.pop("quarter", 1)  # a month says more
        found = pd.to_datetime(pd.DataFrame({"month": 3 * quarter - 2, "day": 1} | parts), errors="coerce")
        if not found.isna().any():
            notes.append(" and ".join(repr(one.name) for one in known) + " put together")
            return pd.DatetimeIndex(found, name="time"), known
    for one in free:
        if one.kind == "numbers" and named > bool(one.name):  # it is not the only column that can be forecast
            title = one.name if source.has_names else ""
            found = dates_of_numbers(title, one.values, f"{source.name}, column {one.name!r}", tells_time(title))
            counts = not one.name and np.array_equal(one.values, np.arange(len(one.values)))
            rising = all(_rises(one.values[rows]) for rows in groups)
            if found is not None and (rising or tells_time(title)):
                return found.rename(title or "time"), [one]
            if not counts and (tells_time(title) or all(_is_axis(title, one.values[rows]) for rows in groups)):
                return pd.Index(one.values, name=title or "time"), [one]
        if one.name:
            break
    return None, []


def tells_time(name: str) -> bool:
    """True if a column's name says that it holds times. A unit in brackets after it is ignored."""
    return re.sub(r"\s*[\[(].*", "", name, flags=re.DOTALL).strip().lower() in TIME_NAMES


def _is_clock(column: Column) -> bool:
    return bool(column.cells.astype(str).str.fullmatch(CLOCK).all())


def _rises(values) -> bool:
    """True if times, or finite numbers, rise strictly, by finite steps."""
    if isinstance(values, pd.DatetimeIndex):
        return values.is_monotonic_increasing and values.is_unique
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.diff(values)
        return bool(np.isfinite(values).all() and np.isfinite(steps.sum()) and (steps > 0).all())


def equal_steps(values: np.ndarray) -> bool:
    """True if numbers rise in equal steps."""
    steps = np.diff(values)
    return _rises(values) and (not len(steps) or bool(np.ptp(steps) <= EQUAL_STEPS * steps.mean()))


def _is_axis(name: str, values: np.ndarray) -> bool:
    """True if numbers (T) without a telling name are a time axis.

    They rise in equal steps, and the name is a counter's, or at least three numbers have no name, or they are whole.
    """
    whole = bool((values == np.round(values)).all())
    return equal_steps(values) and (name.strip().lower() in COUNTER_NAMES or (len(values) >= 3 and (not name or whole)))


def check_order(index: pd.Index, rows: np.ndarray, of: str, columns: list[Column], source: Source) -> None:
    """Raise DataError for times that fall or repeat, or numbers that are not finite."""
    if index.dtype.kind == "f" and not np.isfinite(index.to_numpy()).all():
        at = int((~np.isfinite(index.to_numpy())).argmax())
        raise DataError(f"{source.name}, {source.place(rows[at])}: has no time in {index.name!r}, expected a number")
    if index.is_monotonic_increasing and index.is_unique:
        return
    at = int((index[1:] <= index[:-1]).argmax()) + 1
    before, now = time_texts(index[[at - 1, at]], index)
    place = f"{source.name}, {source.place(rows[at])}, column {index.name!r}"
    clock = ""
    is_night = isinstance(index, pd.DatetimeIndex) and index.tz is None and index[at].hour < 4
    if is_night and (index != index.normalize()).any() and index[at - 1] - index[at] <= pd.Timedelta(hours=1):
        clock = "; if the clock was set back there, write times with their offset from UTC"
    if index[at] == index[at - 1] or (not of and index.duplicated().any()):
        first = index[index.duplicated()][0]
        text = time_texts(index[index.duplicated()][:1], index)[0]
        others = [one.name for one in columns if one.kind == "text"] or ["..."]
        raise DataError(
            f"{place}: the time {text}{of} repeats ({int((index == first).sum())} rows have it); if the table has "
            f"several series, {source.name_id} ({', '.join(others[:3])}), else keep one row for each time{clock}"
        )
    raise DataError(f"{place}: the time {now}{of} comes after {before}; sort the rows by time, the oldest first{clock}")
