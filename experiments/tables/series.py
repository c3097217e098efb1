"""How the columns of a table become series. T time steps, D variables."""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiments.tables.axis import equal_steps, rises, tells_time, time_axis
from experiments.tables.cells import Column, columns_of
from experiments.tables.dates import CLOCK, MONTH, is_date
from experiments.tables.table import DataError, Table
from experiments.tables.times import gapless, regular, time_texts

MISSING = ("error", "interpolate", "keep")
IDS = ("unique_id", "item_id", "id")  # as Nixtla, AutoGluon, Chronos and GluonTS call what tells series apart
MOST_NAMES = 6  # that a line for users lists
FILL = 'fill them with --missing interpolate (missing="interpolate")'
# what stands for missing values in many tables
MARKS = (-99, -99.9, -99.99, -999, -999.9, -999.99, -9999, 9999, -99999, 99999)
LEAVE_OUT = "leave the column out, or name the others with --columns"


def told(series: Sequence[pd.DataFrame]) -> str:
    """One line for users about what was read, such as `hares: 21 rows of 1 variable (hare), time: year, 1900 to 1920`.

    It describes the first series, counts the others, and says what was left out or put together. Raises DataError for
    series with different variables.
    """
    first = series[0]
    if others := [one for one in series if list(one.columns) != list(first.columns)]:
        other = others[0]
        raise DataError(
            f"{other.attrs['name']} has the variables {', '.join(other.columns)}, {first.attrs['name']} has "
            f"{', '.join(first.columns)}; expected the same in all series, choose with --columns"
        )
    rows, count = first.shape
    names = ", ".join([*first.columns[:MOST_NAMES], *(["..."] if count > MOST_NAMES else [])])
    line = f"{first.attrs['name']}: {rows} row{'s' * (rows != 1)} of {count} variable{'s' * (count != 1)} ({names})"
    if not isinstance(first.index, pd.RangeIndex):
        start, end = time_texts(first.index[[0, -1]], first.index)
        line += f", time: {first.index.name}, {start} to {end}"
        line += "" if regular(first.index) else ", not in equal steps"
    if len(series) > 1:
        line += f", and {len(series) - 1} more series"
    notes = list(dict.fromkeys(note for one in series for note in one.attrs.get("notes", [])))
    if gaps := sum(int(one.isna().to_numpy().sum()) for one in series):
        notes.append(f"{gaps} of {sum(one.size for one in series)} values {'is' if gaps == 1 else 'are'} missing")
    if filled := sum(one.attrs.get("filled", 0) for one in series):
        verb = "was" if filled == 1 else "were"
        notes.append(f"{filled} of {sum(one.size for one in series)} values {verb} missing and interpolated")
    for name in first.columns:
        values = np.concatenate([one[name] for one in series])
        others = values[~np.isnan(values) & ~np.isin(values, MARKS)]
        lowest, largest = others.min(initial=0.0), np.abs(others).max(initial=0.0)
        for mark in MARKS:
            if mark in values and (lowest > mark / 3 if mark < 0 else largest < mark / 9):
                notes.append(f"{mark:g} in {name} is read as a value; if it stands for a missing one, write nothing")
    return "; ".join([line, *notes])


def from_frame(frame, missing: str = "error") -> list[pd.DataFrame]:
    """The series in a pandas DataFrame or Series, a row for each time step; `missing` as in `reading.read_series`.

    The index is the time axis if it holds dates, periods, durations (then in seconds) or has a name. Row numbers are
    none, also where a filter has left a part of them. Levels of an index become columns. What `read_series` made stays
    as it is. Errors as in `read_series`.
    """
    if not _is_series(frame):
        return assemble(table_of(frame, "series", "series"), None, missing)
    whole = _complete(frame, missing, np.arange(len(frame)), Table("series"))
    whole.attrs |= frame.attrs
    return [whole]


def _is_series(frame) -> bool:
    """True for what `assemble` made, also where a user has changed its values or left out rows or columns."""
    is_made = isinstance(frame, pd.DataFrame) and {"name", "wide"} <= frame.attrs.keys() and 0 not in frame.shape
    is_whole = is_made and frame.index.is_monotonic_increasing and frame.index.is_unique
    return is_whole and bool((frame.dtypes == np.float64).all())


def table_of(frame, where: str, name: str) -> Table:
    """The columns and the index of a pandas DataFrame or Series, as `from_frame`."""
    if isinstance(frame, pd.Series):
        frame = frame.to_frame("x0" if frame.name is None else frame.name)
    if not isinstance(frame, pd.DataFrame):
        raise DataError(f"{where}: got a {type(frame).__name__}, expected a pandas DataFrame or Series")
    if frame.index.nlevels > 1 and None in frame.index.names:
        names = [*frame.index.names]
        raise DataError(f"{where}: the levels of its index are called {names}; name that of the series id, others too")
    if frame.index.nlevels == 1 and frame.index.name is None:
        is_number, has_dates = frame.index.dtype.kind in "iuf", frame.select_dtypes(["datetime", "datetimetz"]).size
        if is_number and (has_dates or not equal_steps(frame.index.to_numpy(float))):
            return Table(where, name, [(str(title), cells) for title, cells in frame.items()])
        frame = frame.rename_axis("" if is_number else "time")
    return Table(
        where, name, [(str(title), cells) for title, cells in frame.reset_index(allow_duplicates=True).items()]
    )


def assemble(
    table: Table, columns: Sequence[str] | None, missing: str, id: str | None = None, wide: bool = False
) -> list[pd.DataFrame]:
    """The series in a table, as `reading.read_series`; their times are found by `axis.time_axis`."""
    if missing not in MISSING:
        raise DataError(f"missing is {missing!r}, expected one of {', '.join(MISSING)}")
    if not table.columns or not len(table.columns[0][1]):
        raise table.error("has no rows, expected a row for each time step")
    asked = list(dict.fromkeys(columns or ()))
    found = columns_of(table, asked)
    groups, ids = _groups(table, found, asked, id)
    rest = [one for one in found if one is not ids]
    free = [one for one in rest if one.name not in asked]
    axis, used = time_axis(free, groups, sum(bool(one.name) for one in rest), table)
    free = [one for one in free if one not in used]
    again = [one for one in free if axis is not None and one.kind == "numbers" and tells_time(one.name)]
    again = [one for one in again if rises(one.values, groups.values())]
    if columns is not None or len(again) < sum(bool(one.name) for one in free):  # else they are what can be forecast
        table.notes += [f"{one.name!r} left out, as the times are known" for one in again]
        free = [one for one in free if one not in again]
    count = np.arange(len(found[0].cells))  # as pandas or R number rows
    unnamed = [one for one in free if not one.name and not any(np.array_equal(one.values, count + n) for n in (0, 1))]
    table.notes += ["a column without a name left out"] * len(unnamed)
    names = asked if columns is not None else [one.name for one in free if one.name or one.kind == "text"]
    if columns is None and not wide:
        _refuse_times_as_names(names, table)
    whole = _numbers(names, found, table)
    if wide and len(groups) > 1:
        raise table.error(f"has {len(groups)} series, one below the other; leave out --wide or the ids")
    series = []
    for title, rows in groups.items():
        index = pd.RangeIndex(len(rows)) if axis is None else axis[rows]
        frame = _complete(whole.iloc[rows].set_axis(index), missing, rows, table)
        filled = frame.count() - whole.iloc[rows].count()
        for label in names if wide else [title]:
            series.append(frame[[label]].set_axis(["value"], axis=1) if wide else frame)
            series[-1].attrs |= {"name": label, "wide": wide, "filled": int(filled[[label] if wide else names].sum())}
    series[0].attrs["notes"] = table.notes
    return series


def _groups(table: Table, columns: list[Column], asked: Sequence[str], id: str | None) -> tuple[dict, Column | None]:
    """The rows of each series by its name, which is the table's for the only one, and the column that names them."""
    known = [one for one in columns if one.name.lower() in IDS and one.name not in asked]
    repeated = [one for one in known if one.cells.nunique() < len(one.cells)]
    found = repeated[:1] if id is None else [_the_one(id, columns, table)]
    rows = np.arange(len(columns[0].cells))
    if not found:
        return {table.name: rows}, None
    ids = found[0].cells.where(found[0].cells != "").astype("str")
    if ids.isna().any():
        raise table.error(f"has no {found[0].name!r}, which names its series", row=int(ids.isna().argmax()))
    return {str(title): part.to_numpy() for title, part in pd.Series(rows).groupby(ids, sort=False)}, found[0]


def _the_one(name: str, columns: Sequence[Column], table: Table) -> Column:
    """The column with this name. Raises DataError if there is none, or several."""
    found = [one for one in columns if one.name == name]
    if len(found) != 1:
        raise table.error(f"has {len(found)} columns {name!r}, expected one; it has {[one.name for one in columns]}")
    return found[0]


def _numbers(names: Sequence[str], columns: Sequence[Column], table: Table) -> pd.DataFrame:
    """The columns with these names as float64 (T, D). Raises DataError for others than numbers."""
    if not names:
        raise table.error(f"has no column of numbers to forecast, only {[one.name for one in columns]}; expected one")
    found = [_the_one(name, columns, table) for name in names]
    for one in (one for one in found if one.kind != "numbers"):
        cell = str(one.cells.iloc[one.problem])[:40]
        problem = (
            "expected a number, or a date such as 2023-01-31; leave out titles, units and signs, and write nothing for "
            f"a missing value; name a column that tells series apart with --id; or {LEAVE_OUT}"
        )
        raise table.error(f"holds {cell!r}, {problem}", one.name, one.problem)
    return pd.DataFrame({one.name: one.values for one in found}, dtype=np.float64)


def _refuse_times_as_names(names: Sequence[str], table: Table) -> None:
    """Raise DataError if variables are called by times: months, as R prints its `ts`, quarters, years, dates.

    The World Bank writes years as 1990 [YR1990].
    """
    times = rf"(?i:{MONTH}|{CLOCK}|q(?:tr|uarter)?[ _]?[1-4]|(?:1[89]|20)\d\d(?: \[YR\d+\])?)"
    found = [name for name in names if is_date(name) or re.fullmatch(times, name)]
    found = list(names) if list(names) == [str(month) for month in range(1, 13)] else found
    if len(found) > 2:
        problem = f"has columns {found[0]!r} to {found[-1]!r}, which can be variables, or times of a series in each row"
        raise table.error(f"{problem}; write a row for each time, or name the variables with --columns")


def _complete(frame: pd.DataFrame, missing: str, rows: np.ndarray, table: Table) -> pd.DataFrame:
    """The frame, with its missing values, also at times without a row, filled in, refused or kept.

    Raises DataError for infinite values too.
    """
    if len(infinite := np.argwhere(np.isinf(frame.to_numpy()))):
        row, at = infinite[0]
        raise table.error("is infinite, expected a finite number", frame.columns[at], rows[row])
    times, frame = frame.index, frame.reindex(gapless(frame.index))
    gaps = frame.isna().to_numpy()
    if missing == "keep" or not gaps.any():
        return frame
    if missing == "error":
        count, (row, at) = gaps.sum(), np.argwhere(gaps)[0]
        problem = f"{count} of {gaps.size} values {'is' if count == 1 else 'are'} missing, the first"
        if frame.index[row] not in times:
            (time,) = time_texts(frame.index[[row]], times)
            raise table.error(f"{problem} at {time}, which has no row; {FILL}")
        place = table.place(rows[times.get_loc(frame.index[row])])
        raise table.error(f"{problem} in {place}, column {frame.columns[at]!r}; {FILL}; or {LEAVE_OUT}")
    filled = frame.interpolate(method="index", limit_direction="both")
    if len(bad := np.argwhere(~np.isfinite(filled.to_numpy()))):
        problem = f"has no value, or values that are too far apart to interpolate; {LEAVE_OUT}"
        raise table.error(problem, frame.columns[bad[0][1]])
    return filled
